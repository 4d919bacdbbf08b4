"""Tensors of the host on the device, copied on a stream of their own: a copy goes while the device computes the step before.

The host queues a step in less time than the device takes for it, so it reaches the next batch early; its copy then waits for nothing, and
the kernels that read it wait for the copy alone. Images are copied by themselves, the small fields of a batch together in one pinned
buffer: each copy costs a launch, whatever its size. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 16  # bytes up to which a tensor is packed with others
ALIGNMENT = 64  # bytes; compiled kernels load 16 at once


class Upload:
    """Call it with tensors of the host, images pinned; it returns them on the device, for use on the current stream. Those that are there
    already stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same values, shapes and types, in the same order. The host does not wait for pinned tensors, nor for small ones."""
        if self._device.type != "cuda":
            return [tensor.to(self._device) for tensor in tensors]
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        away = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        with torch.cuda.stream(self._stream):
            found, copied = self._copied(away)
        current.wait_stream(self._stream)
        for one in copied:  # made on the other stream: its memory must not be given away before `current` has read it
            one.record_stream(current)
        arrived = iter(found)
        return [next(arrived) if tensor.device.type == "cpu" else tensor for tensor in tensors]

    def _copied(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors on the device, and those of them that own memory there."""
        small = [tensor for tensor in tensors if tensor.nbytes <= SMALL]
        buffer = torch.empty(size_of(small), dtype=torch.uint8, pin_memory=True)
        pack(small, buffer)
        packed = buffer.to(self._device, non_blocking=True)
        views = iter(unpacked(packed, small))
        large = {id(t): t.to(self._device, non_blocking=True) for t in tensors if t.nbytes > SMALL}
        found = [large[id(tensor)] if id(tensor) in large else next(views) for tensor in tensors]
        return found, [packed, *large.values()]


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of a buffer that holds them all."""
    return sum(_reach(tensor) for tensor in tensors)


def pack(tensors: Sequence[Tensor], buffer: Tensor) -> None:
    """Copy the tensors into a buffer of uint8, one behind the other."""
    for tensor, place in zip(tensors, unpacked(buffer, tensors), strict=True):
        place.copy_(tensor)


def unpacked(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the buffer with the shapes and types of the packed tensors."""
    found, begin = [], 0
    for one in like:
        found.append(buffer[begin : begin + one.nbytes].view(one.dtype).view(one.shape))
        begin += _reach(one)
    return found


def _reach(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
