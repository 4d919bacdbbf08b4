"""The keep ratios and the learning rate of a run, as pure functions of progress (epochs, with the fraction of the current one).

All ranks get the same values, and a resume, shorter epochs or another world size do not shift them. The learning rate equals
timm's CosineLRScheduler stepped per update. Built once per run, see `build.build_schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from sparsity.examples.curriculum import ExampleSettings
from sparsity.plan_mix import PlanMix
from sparsity.schedule import KeepSchedule
from sparsity.types import Plan
from trainer.config.schema import OptimConfig


class Stretch(NamedTuple):
    """A part of a run under one plan: `share` of the steps from `start` to `end`, in epochs. Where steps draw their plan, several
    stretches have the same start and end, and their shares sum to 1."""

    start: float
    end: float
    plan: Plan
    share: float = 1.0

    @property
    def text(self) -> str:
        """Epochs and share, e.g. "0 - 30, 50% of the steps"."""
        return f"{self.start:g} - {self.end:g}" + (f", {self.share:.0%} of the steps" if self.share < 1 else "")


def row_of(segment: Stretch, final: Plan) -> str:
    """The name of a stretch's row in `trilevel bench step --json`, which `trilevel estimate` reads."""
    if segment.plan == final:
        return "ours"
    return f"ours from epoch {segment.start:g}" if segment.share == 1 else f"ours at keep ratio {segment.plan.keep_tokens:g}"


class Schedule:
    """The schedule of a run: keep ratios, learning rate, and the share of the data set that an epoch shows.

    repeats: copies of an image in a batch (`data.repeats`), whose rounds of epochs have one selection.
    """

    def __init__(self, epochs: int, keep: KeepSchedule, optim: OptimConfig, examples: ExampleSettings, repeats: int) -> None:
        self.epochs, self._keep, self._optim, self._examples = epochs, keep, optim, examples
        self._all_from = examples.all_from(epochs, repeats)

    def plans(self, progress: float) -> PlanMix:
        """The plans that steps at `progress` draw from; one plan where nothing is drawn."""
        return self._keep.mix(progress)

    def plan(self, progress: float) -> Plan:
        """The plan of an evaluation at `progress`; where nothing is drawn, also that of a step."""
        return self._keep.at(progress)

    @property
    def end(self) -> Plan:
        """The plan that the schedule leads to, which a short run may not reach."""
        return self._keep.end

    def last(self) -> Plan:
        """The plan of the last evaluation: a change exactly at the end is never trained."""
        return self.plan(math.nextafter(float(self.epochs), 0.0))

    def stretches(self) -> list[Stretch]:
        """The run in stretches of one plan each, from 0 to `epochs`, see `KeepSchedule.changes`."""
        changes = self._keep.changes(self.epochs)
        ends = pairwise([*(start for start, _ in changes), float(self.epochs)])
        return [
            Stretch(start, end, plan, share)
            for (start, end), (_, plans) in zip(ends, changes, strict=True)
            for share, plan in plans.parts
        ]

    def lr(self, progress: float) -> float:
        """The learning rate at `progress` = epoch + batch / batches in this epoch.

        Linear from `warmup_lr`, then the cosine over *all* epochs (timm's warmup_prefix=False: the warm-up covers its beginning).
        """
        o = self._optim
        if progress < o.warmup:
            return o.warmup_lr + progress * (o.lr - o.warmup_lr) / o.warmup
        if progress >= self.epochs:
            return o.min_lr
        return o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + math.cos(math.pi * progress / self.epochs))

    @property
    def shares_known(self) -> bool:
        """Whether the settings determine how many examples an epoch shows; if not, only the run can count them and `left_out` is 0."""
        return self._examples.shares_known

    def left_out(self, epoch: int) -> float:
        """The share of the data set that `epoch` leaves out, as far as the settings determine it."""
        return self._examples.left_out if self.shares_known and epoch < self._all_from else 0.0

    def shown(self, epoch: int) -> float:
        """The share of the data set that `epoch` shows, as far as the settings determine it."""
        return 1 - self.left_out(epoch)

    def mean(self, value: Callable[[Plan], float]) -> float:
        """A value of each plan over the run: weighted by epochs and by the share of the examples that an epoch shows."""
        least, all_from, total = self.shown(0), self._all_from, 0.0
        for start, end, plan, share in self.stretches():
            shown = least * max(0.0, min(end, all_from) - start) + max(0.0, end - max(start, all_from))
            total += share * shown * value(plan)
        return total / self.epochs


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate: `lr` times the group's `lr_scale` (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
