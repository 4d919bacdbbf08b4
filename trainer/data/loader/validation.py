"""Images under the evaluation transform: the validation set, every image once, and chosen training images for the rule `probe`."""

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
        self._parts = _Parts(maker, np.arange(len(index)), batch, rank, world)
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


class CleanImages:
    """Chosen training images as the evaluation transform gives them: rank r gets the r-th contiguous part of the ids.

    All ranks have the same number of batches, all batches the same number of rows (one graph under torch.compile, and equal numbers
    of forward passes under ZeRO 3); rows beyond a rank's part are padding with weight 0.
    batch: most images of a batch of one rank; most: ids in one call, over all ranks.
    """

    def __init__(self, maker: BatchMaker, data: DataConfig, batch: int, rank: int, world: int, most: int) -> None:
        index = maker.index
        self._maker, self._rank, self._world = maker, rank, world
        self._workers = data.workers
        self.rows = min(batch, -(-most // world))
        cache = cache_of(index, data)
        self._ahead = Prefetcher(index, cache, 1 / rows_of_node(2 * world, world, rank)[1]) if cache else None

    def of(self, ids: np.ndarray) -> Iterator[Batch]:
        """Batches of these examples, ids (n,) int64 rising."""
        if not len(ids):
            return iter(())
        parts = _Parts(self._maker, ids, self.rows, self._rank, self._world, padded=True)
        loader = Loader(parts, batch_size=None, num_workers=self._workers, pin_memory=torch.cuda.is_available())
        return iter(loader) if self._ahead is None else self._ahead.prefetching(loader, 0, parts.shard, parts.shards)


class _Parts(Dataset[Batch]):
    """Batch number -> Batch of a rank's part of the examples `ids` (n,), rising. padded: the last batch has `batch` rows too."""

    def __init__(self, maker: BatchMaker, ids: np.ndarray, batch: int, rank: int, world: int, *, padded: bool = False) -> None:
        self._maker, self._ids, self._batch, self._padded = maker, ids, batch, padded
        self._begin, self._end = rank * len(ids) // world, (rank + 1) * len(ids) // world
        self._longest = -(-len(ids) // world)

    def __len__(self) -> int:
        return -(-self._longest // self._batch)

    def shard(self, number: int) -> int:
        """The shard that batch `number` begins in."""
        return self._shard_at(min(self._begin + number * self._batch, max(self._begin, self._end - 1)))

    def shards(self, number: int) -> list[int]:
        """Shards from batch `number` on, in the order of need."""
        mine = self._ids[self._begin + number * self._batch : self._end]
        return list(dict.fromkeys(np.asarray(self._maker.index.shard_of(mine)).tolist()))

    def _shard_at(self, position: int) -> int:
        return int(self._maker.index.shard_of(int(self._ids[min(position, len(self._ids) - 1)])))

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin = self._begin + number * self._batch
        slots = self._batch if self._padded else min(self._batch, self._longest - number * self._batch)
        ids = self._ids[begin : max(begin, min(begin + slots, self._end))]
        return to_parent(self._maker.batch(0, Rows(ids, np.zeros_like(ids)), slots))
