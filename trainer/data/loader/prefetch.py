"""Sends the shards that a rank needs next to the fetch process, which downloads them into the node's cache before they are read.

A lane reads all shards of a window at the same time, then those of the next. So the cache must hold (lanes of the node's ranks) x
(shards of a window), and twice that for the next windows to be downloaded while the current ones are read.
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
from trainer.storage.local_rank import local_rank
from trainer.storage.source_tree import python_path

T = TypeVar("T")


class Prefetcher:
    """Sends lists of shards to a fetch process. share: the part of the cache for this rank's shards."""

    def __init__(self, index: Index, cache: Cache, share: float) -> None:
        self._index, self._cache, self._space = index, cache, int(cache.size * share)
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def request(self, shards: Iterable[int]) -> None:
        """Shards in the order of need; as many as fit into the rank's part of the cache are fetched."""
        wanted: dict[int, None] = {}
        space = self._space
        for shard in shards:
            if shard not in wanted:
                space -= self._index.shards[shard]["bytes"]
                if space < 0:
                    break
                wanted[shard] = None
        line = json.dumps([self._index.source(shard) for shard in wanted])
        with suppress(OSError):  # the process died: readers download by themselves, the next call starts another
            stdin = self._running()
            stdin.write(line + "\n")
            stdin.flush()

    def prefetching(
        self, batches: Iterable[T], first: int, place: Callable[[int], Hashable], shards: Callable[[int], Iterable[int]]
    ) -> Iterator[T]:
        """Yields `batches`, numbered from `first`. When place(number) changes, shards(number) are requested before the batch."""
        last: Hashable = None
        iterator: Iterator[T] | None = None
        for number in itertools.count(first):
            if (now := place(number)) != last:
                self.request(shards(number))
                last = now
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
                repr(self._cache.check.since),
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
    """Send `end`, because worker processes may keep the pipe open. Does nothing in a worker, whose rank still needs the process."""
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
    """(rows of a global batch of all ranks on this rank's node, number of these ranks), by the variables of the launcher."""
    first = max(0, rank - local_rank())
    ranks = max(1, min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world - first))
    return (slice_of(batch, world, first)[0], slice_of(batch, world, first + ranks - 1)[1]), ranks


def refuse_small_cache(index: Index, layout: Layout, cache: Cache, rows: tuple[int, int], kept: float) -> None:
    """Raise DataError if the cache is too small for the shards that a node reads at the same time.

    rows: of a global batch, those of all ranks of the node. kept: the smallest share of the examples that an epoch shows
    (dropping examples spreads a window over more shards). Assumes shards of equal size.
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
