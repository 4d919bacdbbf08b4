"""The processes of a run: rank, number of ranks, and the collectives of the trainer, which are the identity for one process."""

from __future__ import annotations

import contextlib
import inspect
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.delayed import Delayed
from trainer.engine.errors import EngineError
from trainer.engine.heartbeat import Heartbeat
from trainer.engine.upload import Upload
from trainer.storage.standard_streams import say


class Processes:
    """rank: of this process; world: number of ranks; device: of communicated tensors; heartbeat: of this rank. The process group must exist
    if world > 1."""

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | str = "cpu", heartbeat: Heartbeat | None = None):
        self.rank, self.world = rank, world
        self.heartbeat = heartbeat or Heartbeat(rank, world, 0.0)
        self.is_main = rank == 0
        self.device = torch.device(device)
        self._delayed = Delayed(self.device)
        self.upload = Upload(self.device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            self.heartbeat.enter("all_reduce")
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenation over ranks along dimension 0, in rank order; lengths may differ."""
        if self.world == 1:
            return tensor
        self.heartbeat.enter("all_gather")
        tensor = tensor.to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(tensor)], dtype=torch.int64, device=self.device))
        counts = [int(n) for n in lengths]
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank (small Python objects)."""
        if self.world == 1:
            return value
        self.heartbeat.enter("broadcast")
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_gather_objects(self, items: list[Any]) -> list[Any]:
        """The items of all ranks, in rank order (small Python objects)."""
        if self.world == 1:
            return list(items)
        self.heartbeat.enter("all_gather_object")
        lists: list[Any] = [None] * self.world
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def read_delayed(self, value: Tensor) -> bool:
        """Whether a number that is equal on all ranks was above 0; on a GPU read two steps late, so that no step waits for it."""
        return any(number > 0 for number, _ in self._delayed.add(value))

    def to_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the device, through pinned memory on a GPU, so that the host does not wait for the copy."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def assert_same_on_all_ranks(self, value: str, what: str) -> None:
        """Raises EngineError if the text differs between ranks. what: its name in the message."""
        if self.world == 1:
            return
        values = self.all_gather_objects([value])
        if len(set(values)) > 1:
            raise EngineError(f"{what} differs between ranks: {dict(enumerate(values))}")

    def first_failure(self, text: str, attempt: int) -> str:
        """The text of the rank that called this first in the attempt with one that is not empty; not collective. This rank's own where the
        store does not answer within 5 s: its process may be gone."""
        found = [text]

        def ask() -> None:
            with contextlib.suppress(Exception):
                store = dist.distributed_c10d._get_default_store()
                found.append(store.compare_set(f"trilevel/failed/{attempt}", "", text).decode())

        if self.world > 1:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(5)
        return found[-1]

    def barrier(self) -> None:
        if self.world > 1:
            self.heartbeat.enter("barrier")
            dist.barrier()

    def meet_at_end(self) -> None:
        """No rank exits before all have written what they had to write: torchrun would wait without limit for one that stops after the
        last step of a run, once the others are gone. Here the watch of the heartbeats names it."""
        if self.world > 1:
            self.heartbeat.enter("the end of the run")
            try:
                dist.barrier()
            except RuntimeError as error:  # gloo's and NCCL's: a rank has ended already
                say(f"trilevel: rank {self.rank}: another rank failed after all was saved ({error})", error=True)
        self.heartbeat.stop()


def ddp_settings() -> dict[str, Any]:
    """Gradients as views of the buckets: no second copy of them. No broadcast in a forward pass: buffers are constants, or
    `RunningStatistics`; torch 2.15 gave that setting another name, and warns of the old one."""
    names = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    no_broadcast = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return {"gradient_as_bucket_view": True, no_broadcast: False}
