"""Shared-memory buffers for the pixels of batches, from worker processes to their rank; reused once no tensor references them.

New shared memory costs both sides a page fault per 4 KiB (.1 ms for an image of 224 px in the worker alone), and a file descriptor
sent through a socket for each tensor of a batch. So pixels stay in their buffer and only its number is sent; the rest is pickled.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from trainer.data.errors import StorageUnavailable

NONE = -1  # no buffer: the batch gets new shared memory
_names = itertools.count()
_known: weakref.WeakValueDictionary[int, BufferPool] = weakref.WeakValueDictionary()  # of the rank's process


def buffers_of(workers: int) -> int:
    """Buffers of a rank's loader: two tasks per worker, the current batch, the previous one, and a spare."""
    return 2 * workers + 3 if workers else 0


class BufferPool:
    """`count` buffers for the pixels of a batch, created before the workers, which address them by number. row_bytes: see `new_buffer`."""

    def __init__(self, count: int, slots: int, size: int, row_bytes: int = 0) -> None:
        self.name, self._buffers = next(_names), [_shared(slots, size, row_bytes) for _ in range(count)]
        self._references: list[weakref.ref[np.ndarray] | None] = [None] * count
        self._sent: set[int] = set()
        _known[self.name] = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_references": [None] * len(self._buffers)}

    def __getitem__(self, number: int) -> Tensor:
        """To be filled, see `new_buffer`."""
        return self._buffers[number]

    def acquire(self) -> int:
        """The number of a buffer that no worker writes and no tensor references; NONE if all are in use."""
        for number in range(
            len(self._buffers)
        ):  # first whether it is away, then who looks at it: `receive` changes them in reverse
            if number not in self._sent and ((reference := self._references[number]) is None or reference() is None):
                self._sent.add(number)
                return number
        return NONE

    def receive(self, number: int) -> Tensor:
        """The filled buffer. It stays in use until this tensor and all its views are deleted."""
        memory = self._buffers[number].numpy()  # a new array each time: its weakref shows when the last tensor is deleted
        self._references[number] = weakref.ref(memory)
        self._sent.discard(number)
        return torch.from_numpy(memory)

    def reclaim(self) -> None:
        """Free buffers that were acquired and never received: no worker has a task any more."""
        self._sent.clear()


def new_buffer(slots: int, size: int, row_bytes: int = 0) -> Tensor:
    """(slots, 3, S, S) uint8, uninitialised. Channels last in memory, as decoders and the resize write; shared in a worker. row_bytes:
    (slots, row_bytes) uint8 instead, for rows that are JPEGs or pixels."""
    if get_worker_info() is not None:
        return _shared(slots, size, row_bytes)
    if row_bytes:
        return torch.empty((slots, row_bytes), dtype=torch.uint8)
    return torch.empty((slots, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def _shared(slots: int, size: int, row_bytes: int) -> Tensor:
    length = slots * (row_bytes or size * size * 3)
    try:
        storage: Any = torch.UntypedStorage._new_shared(length)  # as in torch's default_collate
    except (OSError, RuntimeError) as error:
        raise StorageUnavailable(
            f"shared memory for a batch of {slots} images of {size} px ({length / 2**20:.3g} MiB): {error}; the loader "
            "keeps 2 x data.workers + 3 of them: enlarge /dev/shm (docker run --shm-size=24g), lower data.workers, or set data.workers=0"
        ) from error
    if row_bytes:
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (slots, row_bytes), (row_bytes, 1))
    strides = (size * size * 3, size * 3, 3, 1)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (slots, size, size, 3), strides).permute(0, 3, 1, 2)


def to_parent(batch: Any, buffers: BufferPool | None = None, number: int = NONE) -> Any:
    """A batch as a data set must return it to the loader."""
    return batch if get_worker_info() is None else ToParent(batch, buffers, number)


class ToParent:
    """Pickles a worker's batch (a named tuple, `images` first); unpickling in the rank gives the batch."""

    def __init__(self, batch: Any, buffers: BufferPool | None = None, number: int = NONE) -> None:
        self._batch, self._buffers, self._number = batch, buffers, number

    def __reduce__(self) -> tuple[Any, ...]:
        images, *others = self._batch
        place = _Place(self._buffers.name, self._number) if self._buffers is not None and self._number != NONE else images
        return _rebuild, (type(self._batch), place, [f.numpy() if isinstance(f, Tensor) else f for f in others])


class _Place(NamedTuple):
    buffers: int
    number: int


def _rebuild(kind: Any, images: Tensor | _Place, others: list[Any]) -> Any:
    found = _known[images.buffers].receive(images.number) if isinstance(images, _Place) else images
    return kind(found, *[torch.from_numpy(f) if isinstance(f, np.ndarray) else f for f in others])
