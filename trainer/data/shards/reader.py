"""Reads the bytes of images from shards, merging neighbours into few long reads."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict

import numpy as np

from trainer.data.errors import DataError, StorageUnavailable
from trainer.data.remote.cache import Cache, cache_at
from trainer.data.shards.index import Index

_GAP = 64 << 10  # bytes: smaller gaps are read along, cheaper than another read
_RUN = 16 << 20  # the longest read
_OPEN = 128  # files kept open


class Reader:
    """Images by id. Its only state is open files, so it may be forked or pickled at any time.

    cache: shards are read through it, and its files are closed after each read: an open descriptor would keep the space of an
    evicted file in use. None: local files are read directly, remote shards through the default cache."""

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
        """The bytes of each id, in the order of ids; a DataError in place of unreadable bytes. ids: (b,) int64.

        Raises StorageUnavailable if a server is unreachable or the cache cannot be written: other images would fail too."""
        index = self._index
        wanted, place = np.unique(ids, return_inverse=True)  # ids rise with the offset in a shard
        found: list[memoryview | DataError] = []
        lost: dict[int, str] = {}  # unreadable shards and why: opened once, or every read would go through all retries
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
        got, reason = 0, lost.get(shard, "the file is shorter than in its index")
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
