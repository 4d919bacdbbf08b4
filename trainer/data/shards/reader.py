"""Reads the bytes of images out of shards, in as few and as long reads as their places allow."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict

import numpy as np

from trainer.data.errors import DataError, StorageUnavailable
from trainer.data.remote.cache import Cache, cache_at
from trainer.data.shards.index import Index

_GAP = 64 << 10  # bytes read in vain rather than starting another read
_RUN = 16 << 20  # the longest read
_OPEN = 128  # files kept open


class Reader:
    """Images by id. Holds open files only, so it may be forked or pickled at any time.

    cache: shards are read through it, and its files are open only while they are read, or the space of those that had to go
    would not be free. None: files are read where they are, remote shards through the default cache."""

    def __init__(self, index: Index, cache: Cache | None = None) -> None:
        self._index = index
        self._cache = cache or (cache_at(None, 64) if index.is_remote() else None)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"_index": self._index, "_cache": self._cache, "_files": OrderedDict()}

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, ids: np.ndarray) -> list[memoryview | DataError]:
        """The bytes of each id, in the order asked; what can't be read comes as the error that says why. ids: (b,) int64.

        Raises Outage where a server stays away or the cache can't be written: the next image would fare no better."""
        index = self._index
        wanted, place = np.unique(ids, return_inverse=True)  # ids rise with their place in a shard
        found: list[memoryview | DataError] = []
        lost: dict[int, str] = {}  # shards that can't be had: asked for once, or every run of images would wait out all retries
        if not len(wanted):
            return found
        shard = index.shard_of(wanted)
        begin = index.offset[wanted]
        end = begin + index.length[wanted]
        apart = (shard[1:] != shard[:-1]) | (begin[1:] - end[:-1] > _GAP)
        run = np.concatenate([[0], np.flatnonzero(apart) + 1, [len(wanted)]])
        for a, b in itertools.pairwise(run):
            while a < b:
                c = max(int(a) + 1, int(np.searchsorted(end[a:b], begin[a] + _RUN, side="right")) + int(a))
                found += self._run(int(shard[a]), begin[a:c], end[a:c], lost)
                a = c
            if self._cache is not None and (b == len(wanted) or shard[b] != shard[b - 1]):
                self._close()
        return [found[i] for i in place]

    def _run(self, shard: int, begin: np.ndarray, end: np.ndarray, lost: dict[int, str]) -> list[memoryview | DataError]:
        start, stop = int(begin[0]), int(end[-1])
        buffer = np.empty(stop - start, dtype=np.uint8).data
        got, reason = 0, lost.get(shard, "the file is shorter than its index says")
        try:
            file = -1 if shard in lost else self._open(shard)
            while file >= 0 and got < len(buffer) and (read := os.preadv(file, [buffer[got:]], start + got)):
                got += read
        except StorageUnavailable:
            raise
        except (OSError, DataError) as error:
            reason = lost[shard] = str(error)
        name = self._index.names[shard]
        return [
            buffer[a - start : b - start] if b - start <= got else DataError(f"shard {name} at byte {a}: {reason}")
            for a, b in zip(begin.tolist(), end.tolist(), strict=True)
        ]

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            source = self._index.source(shard)
            flags = os.O_RDONLY | os.O_CLOEXEC
            self._files[shard] = os.open(source.url, flags) if self._cache is None else self._cache.open(source)
            if len(self._files) > _OPEN:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]
