"""The training batches of one rank: its slice of each global batch, decoded. Pixels do not depend on ranks or workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsity.types import Selection
from trainer.config.schema import DataConfig
from trainer.data.batch import Batch
from trainer.data.loader.batch_maker import BatchMaker
from trainer.data.loader.dataset import cache_of
from trainer.data.loader.decoded_ahead import DecodedAhead
from trainer.data.loader.prefetch import Prefetcher, refuse_small_cache, rows_of_node, upcoming
from trainer.data.loader.shared_buffers import NONE, BufferPool, buffers_of, to_parent
from trainer.data.loader.workers import Loader
from trainer.data.order import EpochOrder, Layout, micro_batches, slice_of


class _Task(NamedTuple):
    """A request to a worker. turn: number of the request for an epoch, so that a worker detects a new one. buffer: for its pixels."""

    turn: int
    epoch: int
    step: int
    dropping: bool
    buffer: int = NONE


class _Batches(Dataset[Batch]):
    """Step -> this rank's Batch. `keep` is in shared memory: persistent workers read the next epoch's from it."""

    def __init__(
        self, maker: BatchMaker, layout: Layout, bounds: tuple[int, int], slots: int, keep: Tensor, buffers: BufferPool | None
    ) -> None:
        self._maker, self._layout, self._bounds, self._slots, self._keep = maker, layout, bounds, slots, keep
        self._buffers = buffers
        self._order: tuple[int, EpochOrder] | None = None

    def __getitem__(self, task: _Task) -> Batch:
        if self._order is None or self._order[0] != task.turn:
            keep = self._keep.numpy().copy() if task.dropping else None
            self._order = task.turn, EpochOrder(self._layout, task.epoch, keep)
        rows = self._order[1].rows(task.step, *self._bounds)
        images = None if self._buffers is None or task.buffer == NONE else self._buffers[task.buffer]
        return to_parent(self._maker.batch(task.epoch, rows, self._slots, images), self._buffers, task.buffer)


class _Tasks:
    """The sampler: set before every epoch. A task gets a free buffer when the loader takes it, in the rank's process."""

    def __init__(self, buffers: BufferPool | None) -> None:
        self.tasks: list[_Task] = []
        self._buffers = buffers

    def __iter__(self) -> Iterator[_Task]:
        if self._buffers is None:
            yield from self.tasks
            return
        self._buffers.reclaim()  # at the first task: the loader has waited for those of the previous epoch
        for task in self.tasks:
            yield task._replace(buffer=self._buffers.acquire())

    def __len__(self) -> int:
        return len(self.tasks)


class Stream:
    """Training batches of one rank. `batch_split` holds micro_batch, accumulation and slots: the rows of a Batch.

    The same global batches on any world and with any number of workers; a worker takes every n-th batch. least_shown: the least share
    of the examples that an epoch shows, for the check of the cache's size. decode: for batches with JPEGs.
    Raises ConfigError (a ValueError) if the batch does not fit the world.
    """

    def __init__(
        self, maker: BatchMaker, data: DataConfig, rank: int, world: int, least_shown: float = 1.0,
        decode: DecodedAhead | None = None,
    ) -> None:  # fmt: skip
        index, self.decode, self.row_bytes = maker.index, decode, maker.row_bytes
        self.layout = Layout(index.sizes, maker.seed, data.batch, data.lanes, data.window, data.homes, data.repeats)
        self.batch_split = micro_batches(data.batch, data.micro_batch, world)
        self.bounds = slice_of(data.batch, world, rank)
        self._ahead = None
        if cache := cache_of(index, data):
            rows, ranks = rows_of_node(data.batch, world, rank)
            refuse_small_cache(index, self.layout, cache, rows, least_shown)
            cache.refuse_full_disk()
            self._ahead = Prefetcher(index, cache, 1 / ranks)
        self._keep = torch.zeros(-(-len(index) // 8), dtype=torch.uint8).share_memory_()
        buffers = (
            BufferPool(buffers_of(data.workers), self.batch_split.slots, maker.size, maker.row_bytes) if data.workers else None
        )
        self._tasks, self._turn = _Tasks(buffers), 0
        self._loader = Loader(
            _Batches(maker, self.layout, self.bounds, self.batch_split.slots, self._keep, buffers),
            data.workers,
            data.timeout,
            sampler=self._tasks,
            pin_memory=torch.cuda.is_available(),
        )
        self.fork = self._loader.fork

    def order(self, epoch: int, selection: Selection | None) -> EpochOrder:
        return EpochOrder(self.layout, epoch, None if selection is None else selection.keep)

    def epoch(self, epoch: int, selection: Selection | None, first_batch: int = 0) -> Iterator[Batch]:
        """This rank's slice of global batches first_batch .. steps of the epoch. Finish or drop an epoch's iterator before the next."""
        self._turn += 1
        dropping = selection is not None and selection.num_kept < int(self.layout.first[-1])
        order = self.order(epoch, selection)
        if selection is not None:
            self._keep.copy_(torch.from_numpy(selection.keep))
        self._tasks.tasks = [_Task(self._turn, epoch, step, dropping) for step in range(first_batch, order.steps)]
        batches = iter(self._loader) if self._ahead is None else self._fetched(self._ahead, order, first_batch)
        for batch in batches if self.decode is None else self.decode(batches):
            if selection is not None and selection.weight is not None:
                weights = batch.weights * torch.from_numpy(selection.weight)[batch.ids.clamp(min=0)]
                pinned = batch.weights.is_pinned()  # a product is not; the copy to the device would make the host wait
                batch = batch._replace(weights=weights.pin_memory() if pinned else weights)
            yield batch

    def _fetched(self, ahead: Prefetcher, order: EpochOrder, first_batch: int) -> Iterator[Batch]:
        """The loader's batches, with their shards prefetched; also those of the next epoch, predicted from this epoch's kept examples."""

        def shards(step: int) -> Iterable[int]:
            yield from upcoming(order, step, self.bounds)
            following = EpochOrder(self.layout, order.epoch + 1, order.keep)
            yield from upcoming(following, 0, self.bounds)

        return ahead.prefetching(self._loader, first_batch, lambda step: order.window_at(step).tobytes(), shards)
