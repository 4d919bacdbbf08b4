"""Which shards a rank needs next, told to the process that fetches them into the node's cache before they are read.

A lane reads the shards of one window all at once and then those of the next, so these are what the cache must hold: (lanes of
the node's ranks) x (shards of a window), twice that for the next windows to come in while the current ones are read.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from typing import IO, TypeVar

import numpy as np

from trainer.data.errors import DataError
from trainer.data.order import EpochOrder, Layout, slice_of
from trainer.data.remote.cache import Cache
from trainer.data.shards.index import Index
from trainer.storage.source_tree import python_path

T = TypeVar("T")


class Prefetcher:
    """Keeps a fetching process busy with the shards named last. share: the part of the cache it may fill for this rank."""

    def __init__(self, index: Index, cache: Cache, share: float) -> None:
        self._index, self._cache, self._room = index, cache, int(cache.size * share)
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def request(self, shards: Iterable[int]) -> None:
        """Shards in the order of need; as many as there is room for are fetched."""
        wanted: dict[int, None] = {}
        room = self._room
        for shard in shards:
            if shard not in wanted:
                room -= self._index.shards[shard]["bytes"]
                if room < 0:
                    break
                wanted[shard] = None
        line = json.dumps([self._index.source(shard) for shard in wanted])
        with suppress(OSError):  # it is gone: readers fetch for themselves, the next call starts another
            told = self._running()
            told.write(line + "\n")
            told.flush()

    def prefetching(
        self, batches: Iterable[T], first: int, place: Callable[[int], Hashable], shards: Callable[[int], Iterable[int]]
    ) -> Iterator[T]:
        """`batches`, the first of them number `first`. Where place(number) is new, shards(number) are wanted before the batch."""
        said: Hashable = None
        iterator: Iterator[T] | None = None
        for number in itertools.count(first):
            if (now := place(number)) != said:
                self.request(shards(number))
                said = now
            iterator = iter(batches) if iterator is None else iterator
            try:
                yield next(iterator)
            except StopIteration:
                return

    def _running(self) -> IO[str]:
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            command = [
                sys.executable,
                "-m",
                "trainer.data.remote.fetch_process",
                str(self._cache.folder),
                str(self._cache.size),
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"PYTHONPATH": python_path()},
            )
            self._owner = os.getpid()
            weakref.finalize(self, _end, self._process, self._owner)
        assert self._process.stdin is not None
        return self._process.stdin


def _end(process: subprocess.Popen[str], owner: int) -> None:
    """Tell it to end: its input may stay open in decoding processes. Not from one of those, whose rank still needs it."""
    if owner == os.getpid():
        with suppress(OSError, ValueError, subprocess.TimeoutExpired):
            process.communicate("end\n", timeout=5)
        process.kill()
        process.wait()


def upcoming(order: EpochOrder, step: int, rows: tuple[int, int]) -> Iterator[int]:
    """Shards that these rows of global batches `step`, step + 1, ... are read from, in the order of need, with repetitions."""
    lanes = order.lanes_of(*rows)
    first = order.window_at(step)
    for turn in range(int((order.window_at(order.steps - 1) - first).max()) + 1):
        for lane in lanes.tolist():
            yield from order.shards_of(lane, int(first[lane]) + turn).tolist()


def rows_of_node(batch: int, world: int, rank: int) -> tuple[tuple[int, int], int]:
    """(rows of a global batch that the ranks of this rank's node take, number of these ranks), as the launcher's LOCAL_RANK and
    LOCAL_WORLD_SIZE say."""
    first = max(0, rank - int(os.environ.get("LOCAL_RANK", "0")))
    ranks = max(1, min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world - first))
    return (slice_of(batch, world, first)[0], slice_of(batch, world, first + ranks - 1)[1]), ranks


def refuse_small_cache(index: Index, layout: Layout, cache: Cache, rows: tuple[int, int], kept: float) -> None:
    """Raise DataError, with the number, where the cache can't hold the shards that a node reads at the same time.

    rows: of a global batch, those of all ranks of the node. kept: the smallest share of the examples an epoch shows (dropping
    spreads a window over more shards). Shards are taken as equally long.
    """
    lanes = len(EpochOrder(layout, 0).lanes_of(*rows))
    num_shards, length = len(index.sizes), sum(s["bytes"] for s in index.shards) / len(index.sizes)
    per_window = min(num_shards, int(np.ceil(layout.window * num_shards / max(1.0, len(index) * kept))) + 1)
    shards = min(num_shards, lanes * per_window)
    need = shards * length
    if need > cache.size:
        raise DataError(
            f"data.cache_size={cache.size / 2**30:.3g} (GiB): {lanes} lanes of this node's ranks x {per_window} shards of a "
            f"window are {shards} shards of {length / 2**20:.3g} MiB = {need / 2**30:.3g} GiB read at the same time; raise "
            "data.cache_size, or lower data.lanes or data.window (in images)"
        )
