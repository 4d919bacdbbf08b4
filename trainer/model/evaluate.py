"""Evaluation: every image once on any world size, timm's evaluation transform, the final keep ratios or chosen ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.types import Plan
from trainer.config.schema import AugmentConfig
from trainer.data.augment.on_device import normalise
from trainer.data.batch import Batch


class Scores(NamedTuple):
    """top1, top5, worst_class (lowest accuracy of a class) in [0, 1]; loss in nats; images: each counted once; broken: number of
    broken images, which are excluded from all scores; per_class: accuracy of every class, nan without images; reasons: why images of
    this rank are broken, the first three."""

    top1: float
    top5: float
    loss: float
    worst_class: float
    images: int
    broken: int
    seconds: float
    per_class: list[float]
    reasons: tuple[str, ...] = ()

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)


class Evaluated(NamedTuple):
    """The scores of weights, or of their EMA, under a plan. beside: at one of `evaluate.densities`, not under the run's own plan."""

    ema: bool
    plan: Plan
    scores: Scores
    beside: bool = False


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor, Plan], Any],
    batches: Iterable[Batch],
    plan: Plan,
    classes: int,
    augment: AugmentConfig,
    device: torch.device,
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    between: Callable[[], None] = lambda: None,
) -> Scores:
    """Score `forward` (images (b, 3, H, W) float, plan -> ModelOutput) over the batches of this rank; `add_up` sums over ranks.
    `augment` gives mean and standard deviation.
    `between` is called before every batch; its exceptions end the evaluation.

    The caller puts the model in evaluation mode. Collective if `add_up` is.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # right, right in five, loss, images, broken
    right_of = torch.zeros(2, classes, dtype=torch.float64, device=device)
    started, reasons, broken = time.perf_counter(), [], 0
    for batch in batches:
        between()
        reasons += [reason for _, reason in batch.broken]
        images = normalise(batch.images.to(device, non_blocking=True), augment)
        labels = batch.labels.to(device, non_blocking=True)
        counted = batch.weights.to(device, non_blocking=True) > 0
        logits = forward(images, plan).logits.float()
        ranked = logits.topk(min(5, classes), dim=-1).indices == labels[:, None]
        losses = F.cross_entropy(logits, labels.clamp(0, classes - 1), reduction="none")
        right = ranked[:, 0] & counted
        scores = [right.sum(), (ranked.any(-1) & counted).sum(), (losses * counted).sum(), counted.sum()]
        sums[:4] += torch.stack(scores).double()
        broken += len(batch.broken)
        places = labels.clamp(0, classes - 1)  # rows that do not count add 0: choosing them by a mask would wait for the device
        right_of[0].index_add_(0, places, right.double())
        right_of[1].index_add_(0, places, counted.double())
    sums[4] += broken
    add_up(sums)
    add_up(right_of)
    top1, top5, loss, images, all_broken = sums.tolist()
    per_class = (right_of[0] / right_of[1]).tolist()  # 0 / 0 is nan
    worst = min((accuracy for accuracy in per_class if accuracy == accuracy), default=0.0)
    took, many = time.perf_counter() - started, max(images, 1)
    return Scores(
        top1 / many, top5 / many, loss / many, worst, int(images), int(all_broken), took, per_class, tuple(reasons[:3])
    )
