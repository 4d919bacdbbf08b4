"""Images as the evaluation transform gives them: the validation set, and chosen training images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.config.schema import DataConfig
from trainer.data.batch import Batch
from trainer.data.loader.batch_maker import BatchMaker
from trainer.data.loader.dataset import cache_of
from trainer.data.loader.prefetch import Prefetcher, rows_of_node
from trainer.data.loader.shared_buffers import to_parent
from trainer.data.loader.workers import Loader
from trainer.data.order import Rows
from trainer.data.shards.index import Index

Task = tuple[np.ndarray, int]  # ids (n,) of a batch, and its rows; those beyond n are padding


class CleanImages:
    """Chosen images, rising ids: rank r gets the r-th contiguous part of them. All ranks have the same number of batches, and a batch
    has the same number of rows on all ranks; rows beyond a rank's part are padding with weight 0. Pixels are timm's evaluation
    transform's.

    rows: most images of a batch of one rank. padded: the last batch has `rows` rows too (one graph under torch.compile, equal passes
    under ZeRO 3). The workers live as long as this object; finish or drop an iteration before the next.
    """

    def __init__(self, maker: BatchMaker, data: DataConfig, rows: int, rank: int, world: int, *, padded: bool = True) -> None:
        self.rows, self._rank, self._world, self._padded, self._index = rows, rank, world, padded, maker.index
        self._workers = data.workers
        self._tasks: list[Task] = []  # the sampler: filled by an iteration, so that the workers can start without a task
        self._loader = Loader(
            _Batches(maker), data.workers, data.timeout, sampler=self._tasks, pin_memory=torch.cuda.is_available()
        )
        self.fork = self._loader.fork
        cache = cache_of(self._index, data)
        self._ahead = Prefetcher(self._index, cache, 1 / rows_of_node(2 * world, world, rank)[1]) if cache else None

    @property
    def most_at_once(self) -> int:
        """Images of this rank that its workers hold ready at most: two batches each."""
        return min(2 * self._workers * self.rows, -(-len(self._index) // self._world))

    def of(self, ids: np.ndarray) -> Iterator[Batch]:
        """Batches of these examples, ids (n,) int64 rising."""
        if not len(ids):
            return iter(())
        part = self._part(ids)
        self._tasks[:] = [part.task(number) for number in range(len(part))]
        if self._ahead is None:
            return iter(self._loader)
        return self._ahead.prefetching(self._loader, 0, part.shard, part.shards)

    def _part(self, ids: np.ndarray) -> _Part:
        return _Part(self._index, ids, self.rows, self._rank, self._world, self._padded)


class Validation(CleanImages):
    """Every image of the validation set once over all ranks. batch: images of a batch of one rank. padded: see `CleanImages`."""

    def __init__(self, maker: BatchMaker, data: DataConfig, batch: int, rank: int, world: int, *, padded: bool = False) -> None:
        super().__init__(maker, data, batch, rank, world, padded=padded)
        self._all = np.arange(len(maker.index))

    def __len__(self) -> int:
        return len(self._part(self._all))

    def __iter__(self) -> Iterator[Batch]:
        return self.of(self._all)


class _Part:
    """A rank's part of the examples `ids` (n,), rising, cut into batches."""

    def __init__(self, index: Index, ids: np.ndarray, rows: int, rank: int, world: int, padded: bool) -> None:
        self._index, self._rows, self._padded = index, rows, padded
        self._ids = ids[rank * len(ids) // world : (rank + 1) * len(ids) // world]
        self._next = ids[min((rank + 1) * len(ids) // world, len(ids) - 1)]  # for a rank without images: some shard
        self._longest = -(-len(ids) // world)

    def __len__(self) -> int:
        return -(-self._longest // self._rows)

    def task(self, number: int) -> Task:
        begin = number * self._rows
        rows = self._rows if self._padded else min(self._rows, self._longest - begin)
        return self._ids[begin : begin + rows], rows

    def shard(self, number: int) -> int:
        """The shard that batch `number` begins in."""
        ids = self._ids[number * self._rows :][:1]
        return int(self._index.shard_of(int(ids[0] if len(ids) else self._ids[-1] if len(self._ids) else self._next)))

    def shards(self, number: int) -> list[int]:
        """Shards from batch `number` on, in the order of need."""
        return list(dict.fromkeys(np.asarray(self._index.shard_of(self._ids[number * self._rows :])).tolist()))


class _Batches(Dataset[Batch]):
    """Task -> Batch."""

    def __init__(self, maker: BatchMaker) -> None:
        self._maker = maker

    def __getitem__(self, task: Task) -> Batch:
        ids, rows = task
        return to_parent(self._maker.batch(0, Rows(ids, np.zeros_like(ids)), rows))
