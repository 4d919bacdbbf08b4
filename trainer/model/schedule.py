"""Keep ratios and learning rate as functions of progress (epochs, with the started one in part)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from sparsity.schedule import KeepSchedule
from sparsity.types import Plan
from trainer.config.run_config import Config


def plan_at(progress: float, config: Config) -> Plan:
    """What a step at this progress (in epochs) keeps."""
    return keep_schedule(config).at(progress)


def last_plan(config: Config) -> Plan:
    """What the last step of a run keeps, and so its last score: a change that falls on the very end is never trained under."""
    return plan_at(math.nextafter(float(config.epochs), 0.0), config)


def keep_schedule(config: Config) -> KeepSchedule:
    """How the run comes down to `tokens.keep` and `connections.keep`; levels that are off keep all."""
    p = config.plan
    tokens, connections = config.tokens.method != "all", config.connections.method != "all"
    return KeepSchedule(
        p.method,
        keep_tokens=config.tokens.keep if tokens else 1.0,
        keep_connections=config.connections.keep if connections else 1.0,
        warmup=p.warmup,
        length=p.length,
        plateaus=p.plateaus,
        stairs=[(start, t if tokens else 1.0, c if connections else 1.0) for start, t, c in p.stairs],
    )


def learning_rate(progress: float, config: Config) -> float:
    """The learning rate at `progress` = epoch + batch / batches in this epoch.

    Linear from `warmup_lr`, then the cosine over *all* epochs (timm's warmup_prefix=False: the warm-up covers its beginning).
    """
    o = config.optim
    if progress < o.warmup:
        return o.warmup_lr + progress * (o.lr - o.warmup_lr) / o.warmup
    if progress >= config.epochs:
        return o.min_lr
    return o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + math.cos(math.pi * progress / config.epochs))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its rate: `lr` times the group's `lr_scale` (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def stretches(config: Config) -> list[tuple[float, Plan]]:
    """Where the plan changes, in epochs, from 0 on."""
    return keep_schedule(config).changes(config.epochs)


def whole_run(config: Config, ratio: Callable[[Plan], float]) -> float:
    """A ratio to dense by plan, over the run: weighted by epochs and by the share of the examples that an epoch shows."""
    changes, e = stretches(config), config.examples
    removed = 0.0 if e.method in UNKNOWN else e.removed
    rounds = config.data.repeats
    everything = -(-(config.epochs - round(e.anneal * config.epochs)) // rounds) * rounds  # as in `Curriculum`
    total = 0.0
    for (start, end), (_, plan) in zip(pairwise([*[s for s, _ in changes], float(config.epochs)]), changes, strict=True):
        shown = (1 - removed) * max(0.0, min(end, everything) - start) + max(0.0, end - max(start, everything))
        total += shown * ratio(plan)
    return total / config.epochs


UNKNOWN = frozenset({"infobatch"})  # methods whose share of the examples only the run can tell
