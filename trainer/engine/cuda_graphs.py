"""CUDA graphs of the compiled network (`engine.cuda_graphs`), by torch's own: the modes of torch.compile that record them.

A graph writes its outputs to the same memory in every step: logits, what the backward pass reads, and gradients. All of them must be done
with when the next forward pass begins, of which `begin_pass` informs torch. In the training loop they are: the loss is computed from logits
before, sums and observations go to memory of their own, and gradients are dropped behind the optimizer's step. The gradients of several
micro-batches are not, nor those of DistributedDataParallel, so these are refused.
"""

from __future__ import annotations

import torch

from trainer.config.errors import ConfigError
from trainer.config.schema_run import EngineConfig
from trainer.data.order import BatchSplit

OFF = "or set engine.cuda_graphs=false"


def mode_of(settings: EngineConfig) -> str | None:
    """The mode of torch.compile; None: its default."""
    if settings.cuda_graphs:
        return "max-autotune" if settings.autotune else "reduce-overhead"
    return "max-autotune-no-cudagraphs" if settings.autotune else None


def refuse(on_gpu: bool, world: int, split: BatchSplit) -> None:
    """Raises ConfigError where CUDA graphs can't be used: by what only the start of a run knows."""
    if not on_gpu:
        raise ConfigError(f"engine.cuda_graphs=true: no CUDA device here; start on a machine with one, {OFF}")
    if world > 1:
        raise ConfigError(
            f"engine.cuda_graphs=true on {world} processes: torch's DistributedDataParallel fails with CUDA graphs (open issues 113809 and "
            f"140395 of pytorch); start one process, {OFF}"
        )
    if split.accumulation > 1:
        rows = split.micro_batch * split.accumulation
        raise ConfigError(
            f"engine.cuda_graphs=true with data.micro_batch={split.micro_batch}: {split.accumulation} micro-batches per step, and the "
            f"graph of the second would overwrite the gradients of the first; set data.micro_batch={rows}, {OFF}"
        )


def begin_pass(settings: EngineConfig) -> None:
    """Call before each forward pass: outputs of the one before, and of its backward pass, are not needed any more."""
    if settings.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()
