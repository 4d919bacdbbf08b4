"""Memory in which batches travel from decoding processes to their rank, used again once nobody holds the last batch in it.

Fresh shared memory costs both sides a page fault for every 4 KiB, .1 ms of an image of 224 px in the worker alone, and each tensor of a
batch a file handed over through a socket. So pixels stay where they are and go by their room's number, the rest goes as bytes.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

NONE = -1  # no room: the batch goes through memory of its own
_names = itertools.count()
_known: weakref.WeakValueDictionary[int, BufferPool] = weakref.WeakValueDictionary()  # of the rank's process


class BufferPool:
    """`count` rooms for the pixels of a batch, made before the decoding processes, which are given their numbers."""

    def __init__(self, count: int, slots: int, size: int) -> None:
        self.name, self._rooms = next(_names), [_shared(slots, size) for _ in range(count)]
        self._held: list[weakref.ref[np.ndarray] | None] = [None] * count
        self._away: set[int] = set()
        _known[self.name] = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": [None] * len(self._rooms)}

    def __getitem__(self, number: int) -> Tensor:
        """(slots, 3, S, S) uint8, to be filled."""
        return self._rooms[number]

    def acquire(self) -> int:
        """A room that nobody works in or looks at, NONE where there is none."""
        for number in range(
            len(self._rooms)
        ):  # first whether it is away, then who looks at it: `receive` changes them in reverse
            if number not in self._away and ((held := self._held[number]) is None or held() is None):
                self._away.add(number)
                return number
        return NONE

    def receive(self, number: int) -> Tensor:
        """What was filled. The room is taken until this tensor and all its views are gone."""
        memory = self._rooms[number].numpy()  # a new array each time; the tensor's memory lives and dies with it
        self._held[number] = weakref.ref(memory)
        self._away.discard(number)
        return torch.from_numpy(memory)

    def reclaim(self) -> None:
        """What was taken and has not arrived won't: no worker has a task any more."""
        self._away.clear()


def new_buffer(slots: int, size: int) -> Tensor:
    """(slots, 3, S, S) uint8, not yet filled. Channels last in memory, as decoders and the resize write; shared in a worker."""
    if get_worker_info() is None:
        return torch.empty((slots, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return _shared(slots, size)


def _shared(slots: int, size: int) -> Tensor:
    storage: Any = torch.UntypedStorage._new_shared(slots * size * size * 3)  # what torch's own collate takes
    strides = (size * size * 3, size * 3, 3, 1)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (slots, size, size, 3), strides).permute(0, 3, 1, 2)


def to_parent(batch: Any, rooms: BufferPool | None = None, number: int = NONE) -> Any:
    """A batch as a data set hands it to its loader."""
    return batch if get_worker_info() is None else ToParent(batch, rooms, number)


class ToParent:
    """A batch (a named tuple, `images` first) that a worker has made; it is the batch again when it arrives."""

    def __init__(self, batch: Any, rooms: BufferPool | None = None, number: int = NONE) -> None:
        self._batch, self._rooms, self._number = batch, rooms, number

    def __reduce__(self) -> tuple[Any, ...]:
        images, *others = self._batch
        place = _Place(self._rooms.name, self._number) if self._rooms is not None and self._number != NONE else images
        return _arrived, (type(self._batch), place, [f.numpy() if isinstance(f, Tensor) else f for f in others])


class _Place(NamedTuple):
    rooms: int
    number: int


def _arrived(kind: Any, images: Tensor | _Place, others: list[Any]) -> Any:
    found = _known[images.rooms].receive(images.number) if isinstance(images, _Place) else images
    return kind(found, *[torch.from_numpy(f) if isinstance(f, np.ndarray) else f for f in others])
