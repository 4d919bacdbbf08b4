"""What level 1 costs a step: `Objective.credit` and `observe` by themselves, at ImageNet's size, and the memory that they hold.

Part of `trilevel bench step`, and of `make gpu PART=step`, where a read of the device by the host would raise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from sparsity.types import Record
from trainer.config.run_config import Config
from trainer.data.augment.mixup import draw_mix
from trainer.data.batch import Batch
from trainer.model.build import build_examples
from trainer.model.objective import Objective

EXAMPLES = 1_281_167  # ImageNet-1k
WARM_UP, STEPS, AT_ONCE = 5, 40, 10  # AT_ONCE steps are timed together: one takes less than a clock and a synchronisation say


def bookkeeping(config: Config, device: torch.device, examples: int = EXAMPLES) -> dict[str, Any]:
    """{median, min, max, unit: "ms", megabytes, examples}: a micro-batch of the configured size, mixed as configured.

    megabytes: state of the method on host and device, without the labels, which it shares with the index. On a GPU the
    time ends when the device is done, and RuntimeError is raised where the host would wait for it.
    """
    rows = config.data.micro_batch
    index: Any = _Index(examples, config.model.classes)
    level, objective = build_examples(config, index), Objective(config)
    batch = _batch(rows, examples, config, device)
    mix = draw_mix(config.augment, config.seed, 0, config.model.image_size)
    logits = torch.randn(rows, config.model.classes, generator=torch.Generator().manual_seed(0)).to(device)
    spread = torch.rand(rows, 49, generator=torch.Generator().manual_seed(1)).to(device) if level.wants_spread else None
    record = Record(logits, spread, None, None, None)
    losses = objective.losses(logits, objective.targets(batch.labels, mix, batch.weights))

    def one() -> None:
        level.observe(*objective.credit(batch, record, losses, mix))

    for _ in range(WARM_UP):
        one()
    times = []
    for _ in range(STEPS):
        times.append(_timed(one, device))
    about = {"median": median(times), "min": min(times), "max": max(times), "unit": "ms of bookkeeping"}
    return about | {"megabytes": level.held_bytes / 1e6, "examples": examples, "method": config.examples.method}


def told(row: dict[str, Any]) -> str:
    """The row for a person."""
    return (
        f"bookkeeping of examples ({row['method']}): {row['median']:.3f} ms a step ({row['min']:.3f} - {row['max']:.3f}), "
        f"{row['megabytes']:.1f} MB at {row['examples']:,} examples"
    )


class _Index:
    """As much of an index as a method of level 1 asks for."""

    def __init__(self, examples: int, classes: int) -> None:
        self.labels = np.arange(examples, dtype=np.int32) % classes

    def __len__(self) -> int:
        return len(self.labels)


def _timed(one: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of a step, mean of AT_ONCE."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode() if gpu else 0
    started = time.perf_counter()
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(AT_ONCE):
            one()
    finally:
        if gpu:
            torch.cuda.set_sync_debug_mode(before)
    if gpu:
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - started) / AT_ONCE


def _batch(rows: int, examples: int, config: Config, device: torch.device) -> Batch:
    ids = torch.randperm(examples, generator=torch.Generator().manual_seed(2))[:rows]
    nothing = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(
        images=torch.zeros(rows, 0), labels=ids % config.model.classes, ids=ids, copies=nothing, weights=torch.ones(rows),
        flip=nothing, erase=nothing, draw=ids, broken=[],
    )  # fmt: skip
    return Batch(*(field.to(device) for field in batch[:-1]), broken=[])
