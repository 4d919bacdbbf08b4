"""The validation set: every image once, on any number of ranks."""

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


class Validation:
    """Every image once over all ranks: rank r iterates the r-th contiguous part; all ranks have the same number of batches.

    Rows beyond the part are padding with weight 0. Pixels are timm's evaluation transform's. batch: images of a batch of one rank.
    """

    def __init__(self, maker: BatchMaker, data: DataConfig, batch: int, rank: int, world: int) -> None:
        index = maker.index
        self._parts = _Parts(maker, len(index), batch, rank, world)
        self._workers = data.workers
        cache = cache_of(index, data)
        self._ahead = Prefetcher(index, cache, 1 / rows_of_node(2 * world, world, rank)[1]) if cache else None

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        loader = Loader(
            self._parts,
            batch_size=None,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
        )
        return (
            iter(loader) if self._ahead is None else self._ahead.prefetching(loader, 0, self._parts.shard, self._parts.shards)
        )


class _Parts(Dataset[Batch]):
    """Batch number -> Batch of a rank's part of the validation set."""

    def __init__(self, maker: BatchMaker, num_examples: int, batch: int, rank: int, world: int) -> None:
        self._maker, self._batch = maker, batch
        self._begin, self._end = rank * num_examples // world, (rank + 1) * num_examples // world
        self._longest = -(-num_examples // world)

    def __len__(self) -> int:
        return -(-self._longest // self._batch)

    def shard(self, number: int) -> int:
        """The shard that batch `number` begins in."""
        return int(self._maker.index.shard_of(min(self._begin + number * self._batch, max(self._begin, self._end - 1))))

    def shards(self, number: int) -> range:
        """Shards from batch `number` on, in the order of need."""
        last = int(self._maker.index.shard_of(max(self._begin, self._end - 1)))
        return range(self.shard(number), min(last, len(self._maker.index.sizes) - 1) + 1)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin = self._begin + number * self._batch
        slots = min(self._batch, self._longest - number * self._batch)
        ids = np.arange(begin, max(begin, min(begin + slots, self._end)))
        return to_parent(self._maker.batch(0, Rows(ids, np.zeros_like(ids)), slots))
