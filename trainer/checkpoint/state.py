"""The part of a checkpoint that is not tensors: the position in the run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from sparsity.attention_kernel import Kernels
from sparsity.types import Selection


@dataclass(frozen=True)
class TrainState:
    """Position of a run: the next batch is `batch` of `epoch`; `step` optimizer steps are done."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0  # presented with a weight above 0
    seconds: float = 0.0  # of training, over all attempts
    attempt: int = 0
    chain: str = ""  # hash chain of all batches, see `hash_chain`
    best: float = float("-inf")
    best_step: int = -1
    broken: dict[str, str] = field(default_factory=dict)  # example id -> reason
    skipped: list[int] = field(default_factory=list)  # steps whose gradient was not finite, as the journal counts
    progress: float = 0.0  # epochs done, the current one as a fraction
    pending_evaluation: dict[str, float] = field(
        default_factory=dict
    )  # an evaluation that a stop cut short, {"at": progress its plan is of}

    def advanced(self, batches: int) -> TrainState:
        """After one more batch of an epoch that has `batches` of them."""
        end = self.batch + 1 >= batches
        epoch, batch = self.epoch + end, 0 if end else self.batch + 1
        return replace(self, epoch=epoch, batch=batch, step=self.step + 1, progress=epoch + batch / batches)


@dataclass(frozen=True)
class Saved:
    """The result of `save_load.load`."""

    state: TrainState
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    examples: dict[str, np.ndarray]
    selection: Selection | None
    path: Path
    pruning: dict[str, Tensor] = field(default_factory=dict)  # of level 4
    kernels: Kernels = field(default_factory=dict)  # of attention, as chosen by time on a GPU
    kernels_on: str = ""  # name of that GPU; empty in older checkpoints
