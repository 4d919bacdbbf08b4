"""Shared buffers are reused, and never while a tensor still references them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests.support.images import config, write_shards
from trainer.data.loader import shared_buffers as module
from trainer.data.loader.build import training_stream
from trainer.data.loader.shared_buffers import NONE, BufferPool
from trainer.data.shards.index import build_index


def test_a_buffer_is_free_again_when_its_last_view_is_deleted() -> None:
    buffers = BufferPool(2, 3, 8)
    assert (buffers.acquire(), buffers.acquire(), buffers.acquire()) == (0, 1, NONE)
    buffers[1].fill_(7)
    seen = buffers.receive(1)
    assert seen.shape == (3, 3, 8, 8) and seen.is_contiguous(memory_format=torch.channels_last) and (seen == 7).all()
    assert seen.data_ptr() == buffers[1].data_ptr() and buffers.acquire() == NONE, "the tensor references it"
    part = seen[1:].numpy()
    del seen
    gc.collect()
    assert buffers.acquire() == NONE, "a view references it"
    del part
    gc.collect()
    assert buffers.acquire() == 1 and buffers.acquire() == NONE, "0 was not received"
    buffers.reclaim()
    assert (buffers.acquire(), buffers.acquire()) == (0, 1)


def test_kept_batches_stay_what_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_index(write_shards(tmp_path, [60, 60, 72]), progress=False)
    numbers: list[int] = []
    take = BufferPool.acquire
    monkeypatch.setattr(BufferPool, "acquire", lambda self: numbers.append(found := take(self)) or found)
    reference = [b.images.clone() for b in training_stream(index, config("x"), 0, 1).epoch(0, None)]
    stream = training_stream(index, config("x", data={"workers": 1}), 0, 1)
    for epoch, step in ((1, 2), (0, 0)):  # an epoch left half way, its tasks still out, then a whole one
        kept = []
        for batch in stream.epoch(epoch, None):
            kept.append(batch)
            if step and len(kept) == step:
                break
    assert module.NONE in numbers, "more are kept than there are buffers"
    assert len(kept) == len(reference) and all(torch.equal(a.images, b) for a, b in zip(kept, reference, strict=True))
    del kept, batch
    numbers.clear()
    for batch, expected in zip(stream.epoch(0, None), reference, strict=True):
        assert torch.equal(batch.images, expected)
    assert module.NONE not in numbers and len(set(numbers)) < len(numbers), "buffers are used again"
