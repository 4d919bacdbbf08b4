"""The cost of level 1 per step: time of `Objective.credit` and `observe` alone, at ImageNet's size, and their memory.

Part of `trilevel bench step` and of `make gpu PART=step`, where a host sync would raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from sparsity.types import ModelOutput
from trainer.bench.result import stats
from trainer.config.run_config import Config
from trainer.data.augment.mixup import draw_mix
from trainer.data.batch import Batch
from trainer.data.shards.index import Index
from trainer.model.build import build_examples, build_objective
from trainer.telemetry.timing import seconds

EXAMPLES = 1_281_167  # ImageNet-1k
WARM_UP, STEPS, AT_ONCE = 5, 40, 10  # AT_ONCE steps are timed together: a single one is too short for clock and synchronisation


def bookkeeping(config: Config, device: torch.device, examples: int = EXAMPLES) -> dict[str, Any]:
    """{median, min, max, unit: "ms", megabytes, examples}: a micro-batch of the configured size, mixed as configured.

    megabytes: state of the method on host and device, without the labels, which it shares with the index. On a GPU the time
    includes the work of the device, and a host sync raises RuntimeError.
    """
    rows = config.data.micro_batch
    level, objective = build_examples(config, stand_in(examples, config.model.classes)), build_objective(config)
    batch = _batch(rows, examples, config, device)
    mix = draw_mix(config.augment, config.seed, 0, config.model.image_size)
    logits = torch.randn(rows, config.model.classes, generator=torch.Generator().manual_seed(0)).to(device)
    spread = torch.rand(rows, 49, generator=torch.Generator().manual_seed(1)).to(device) if level.wants_spread else None
    output = ModelOutput(logits, spread, None, None, None)
    losses = objective.losses(logits, objective.targets(batch.labels, mix, batch.weights))

    def one() -> None:
        level.observe(*objective.credit(batch, output, losses, mix))

    for _ in range(WARM_UP):
        one()
    times = [_timed(one, device) for _ in range(STEPS)]
    return stats(times, "ms of bookkeeping") | {
        "megabytes": level.state_bytes / 1e6,
        "examples": examples,
        "method": config.examples.method,
    }


def describe(row: dict[str, Any]) -> str:
    """The row as text."""
    return (
        f"bookkeeping of examples ({row['method']}): {row['median']:.3f} ms per step ({row['min']:.3f} - {row['max']:.3f}), "
        f"{row['megabytes']:.1f} MB at {row['examples']:,} examples"
    )


class _Labels:
    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


def stand_in(examples: int, classes: int) -> Index:
    """The part of an index that a method of level 1 uses."""
    return cast(Index, _Labels(np.arange(examples, dtype=np.int32) % classes))


def _timed(one: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of a step, mean of AT_ONCE. On a GPU a host sync raises."""

    def several() -> None:
        mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        try:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            for _ in range(AT_ONCE):
                one()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode(mode)

    return 1000 * seconds(several, device) / AT_ONCE


def _batch(rows: int, examples: int, config: Config, device: torch.device) -> Batch:
    ids = torch.randperm(examples, generator=torch.Generator().manual_seed(2))[:rows]
    nothing = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(
        images=torch.zeros(rows, 0), labels=ids % config.model.classes, ids=ids, copies=nothing, weights=torch.ones(rows), policy=nothing,
        flip=nothing, erase=nothing, jpeg=nothing, rng_keys=ids, broken=[],
    )  # fmt: skip
    return Batch(*(field.to(device) for field in batch[:-1]), broken=[])
