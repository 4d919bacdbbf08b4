"""Batches travel in memory that is used again, never while somebody still looks at what is in it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests.support.images import config, write_shards
from trainer.data.loader import shared_buffers as module
from trainer.data.loader.shared_buffers import NONE, BufferPool
from trainer.data.loader.stream import Stream
from trainer.data.shards.index import build_index


def test_a_room_is_free_again_when_the_last_view_is_gone() -> None:
    rooms = BufferPool(2, 3, 8)
    assert (rooms.acquire(), rooms.acquire(), rooms.acquire()) == (0, 1, NONE)
    rooms[1].fill_(7)
    seen = rooms.receive(1)
    assert seen.shape == (3, 3, 8, 8) and seen.is_contiguous(memory_format=torch.channels_last) and (seen == 7).all()
    assert seen.data_ptr() == rooms[1].data_ptr() and rooms.acquire() == NONE, "still looked at"
    part = seen[1:].numpy()
    del seen
    gc.collect()
    assert rooms.acquire() == NONE, "a part of it is"
    del part
    gc.collect()
    assert rooms.acquire() == 1 and rooms.acquire() == NONE, "0 has not arrived"
    rooms.reclaim()
    assert (rooms.acquire(), rooms.acquire()) == (0, 1)


def test_kept_batches_stay_what_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_index(write_shards(tmp_path, [60, 60, 72]), progress=False)
    numbers: list[int] = []
    take = BufferPool.acquire
    monkeypatch.setattr(BufferPool, "acquire", lambda self: numbers.append(found := take(self)) or found)
    reference = [b.images.clone() for b in Stream(index, config("x"), 0, 1).epoch(0, None)]
    stream = Stream(index, config("x", data={"workers": 1}), 0, 1)
    for epoch, step in ((1, 2), (0, 0)):  # an epoch left half way, its tasks still out, then a whole one
        kept = []
        for batch in stream.epoch(epoch, None):
            kept.append(batch)
            if step and len(kept) == step:
                break
    assert module.NONE in numbers, "more are kept than there are rooms"
    assert len(kept) == len(reference) and all(torch.equal(a.images, b) for a, b in zip(kept, reference, strict=True))
    del kept, batch
    numbers.clear()
    for batch, expected in zip(stream.epoch(0, None), reference, strict=True):
        assert torch.equal(batch.images, expected)
    assert module.NONE not in numbers and len(set(numbers)) < len(numbers), "rooms are used again"
