"""Copies to a GPU on a stream of their own: what is packed comes out as it went in, kernels wait for the copy, memory is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.engine import upload
from trainer.engine.upload import ALIGNMENT, Upload, pack, size_of, unpacked

TYPES = [torch.uint8, torch.bool, torch.int32, torch.int64, torch.float32, torch.float64]


@given(st.lists(st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 7), max_size=3)), max_size=8), st.integers(0, 99))
def test_packed_tensors_come_out_as_they_went_in(shapes: list[tuple[torch.dtype, list[int]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randint(0, 2 if kind == torch.bool else 100, shape, generator=generator).to(kind) for kind, shape in shapes
    ]
    buffer = torch.empty(size_of(tensors), dtype=torch.uint8)
    pack(tensors, buffer)
    found = unpacked(buffer, tensors)
    assert len(found) == len(tensors)
    for mine, theirs in zip(found, tensors, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)
        assert mine.numel() == 0 or (mine.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0, (
            "compiled kernels load 16 bytes at once"
        )


def test_on_a_cpu_the_tensors_are_used_as_they_are() -> None:
    tensors = [torch.arange(3), torch.ones(2, 2)]
    assert all(mine is theirs for mine, theirs in zip(Upload(torch.device("cpu"))(tensors), tensors, strict=True))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on a GPU, pretended: copies with their stream, waits, and tensors whose memory a stream still reads."""
    happened: list[str] = []
    now = ["current"]

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "copies"

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        now.append(stream.name)
        yield
        now.pop()

    def to(tensor: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        happened.append(f"{tensor.nbytes} bytes on {now[-1]}" + " blocking" * (not non_blocking))
        return tensor.clone()

    empty = torch.empty

    def made(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        happened.append("pinned" * pin_memory)
        return empty(*size, **more)

    monkeypatch.setattr(torch, "empty", made)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: happened.append(f"{t.nbytes} bytes kept for {stream.name}")
    )
    return happened


def test_a_batch_is_two_copies_on_another_stream_which_the_kernels_wait_for(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "SMALL", 100)
    tensors = [torch.ones(200, dtype=torch.uint8), torch.arange(3), torch.tensor([True, False]), torch.ones(4)]
    copies = Upload(torch.device("cuda", 0))
    for _ in range(2):
        found = copies(tensors)
        assert all(
            torch.equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in zip(found, tensors, strict=True)
        )
        expected = ["pinned", "192 bytes on copies", "200 bytes on copies", "current waits for copies"]
        assert events == [*expected, "192 bytes kept for current", "200 bytes kept for current"]
        events.clear()
