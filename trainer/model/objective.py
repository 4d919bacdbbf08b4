"""The loss of a step, and its observations of the examples.

Losses are timm's: soft-target cross entropy (DeiT), or binary cross entropy against "is this class in the picture" (Wightman et
al. 2021; DeiT III), per example in float32; the caller weights them and divides by the weight of the global batch. `credit`
makes one observation per image from the same forward pass: no extra pass. `probed` makes those of clean images (`examples.rule:
probe`); the training accuracy is then that of `clear`.

Letters: b rows of a micro-batch, C classes, n_last patch tokens in the last block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.types import ModelOutput, Observation
from trainer.config.errors import ConfigError
from trainer.data.augment.mixup import Mix, mix_targets, partners

if TYPE_CHECKING:
    from trainer.data.batch import Batch


Flags = tuple[bool | Tensor, bool | Tensor, bool | Tensor]
"""`Mix.flags`, known to the host or 0-dim on the device."""


class Objective:
    """Targets, losses and observations. Holds no state.

    loss: `optim.loss`. smoothing: `augment.smoothing`. rule: `examples.rule`. Raises ConfigError if they contradict each other.
    """

    def __init__(self, classes: int, loss: str = "soft", *, smoothing: float = 0.0, rule: str = "clear"):
        self.classes, self.loss, self.smoothing = classes, loss, smoothing
        self.rule = "clear" if rule == "probe" else rule
        if self.loss == "bce" and self.smoothing > 0:
            raise ConfigError(
                f"optim.loss=bce with augment.smoothing={self.smoothing}: binary targets are 1 wherever soft ones are above 0, "
                "so smoothing would make every class right; set augment.smoothing=0"
            )

    def targets(self, labels: Tensor, mix: Mix, weights: Tensor) -> Tensor:
        """Soft targets: labels (b,) int64 -> (b, C) float32, as timm's `mixup_target`."""
        return mix_targets(labels, mix, weights, self.classes, self.smoothing)

    def losses(self, logits: Any, targets: Tensor) -> Tensor:
        """Loss of each row by its label: logits and targets (b, C) -> (b,) float32, unweighted. Of a pair of logits, that of a model with
        a distillation token in training, the first are for the labels."""
        logits = (logits if isinstance(logits, Tensor) else logits[0]).float()
        if self.loss == "soft":
            return torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1)
        present = targets.gt(0.0).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(dim=-1)

    def credit(self, batch: Batch, output: ModelOutput, losses: Tensor, mix: Mix) -> tuple[Tensor, Observation]:
        """See `credited`."""
        return self.credited(batch, output.logits, losses, mix.flags, spread_of(output))

    @torch.no_grad()
    def credited(
        self, batch: Batch, logits: Any, losses: Tensor, mixed: Flags | tuple[Tensor, ...], spread: Tensor | None
    ) -> tuple[Tensor, Observation]:
        """One observation per image: ids (b,) int64, the example that each row is credited to, and the observation.

        In a mixed pair each image dominates exactly one of the two rows, and that row is credited to it (at lam = 1/2, each row
        to its own image). `dominant`: right when the prediction is the dominating label, which is the argmax of the soft target.
        `without_partner`: the same, with the lesser label excluded from the argmax, so that a close second is not an error.
        `clear`: the same, and only rows in which one image has a share >= CLEAR count: between two halves the prediction is a coin toss.
        `authors` (Tri-Level's code): each row is credited to its own image and label, however small its share.
        Not valid: rows of weight 0, copies of an image but the first (they share one set of weights), and rows whose loss is not
        finite.
        """
        mixes, lesser_share, unclear = mixed
        logits, labels, there = _prediction(logits), batch.labels, batch.weights > 0
        both = there & partners(there) & mixes
        swap = both & lesser_share if self.rule != "authors" else torch.zeros_like(both)
        ids, label, lesser, copies = (
            torch.where(swap, theirs, own)
            for own, theirs in (
                (batch.ids, partners(batch.ids)),
                (labels, partners(labels)),
                (partners(labels), labels),
                (batch.copies, partners(batch.copies)),
            )
        )
        if self.rule in ("without_partner", "clear"):
            out = (both & (lesser != label))[:, None] & F.one_hot(lesser.clamp(min=0), logits.shape[1]).bool()
            logits = logits.masked_fill(out, float("-inf"))
        valid = there & (copies == 0) & losses.isfinite()
        right = logits.argmax(dim=-1) == label
        clear = None if self.rule != "clear" or unclear is False else ~(both & unclear)
        spread = torch.zeros_like(losses) if spread is None else spread
        return ids, Observation(correct=right, loss=losses.detach(), spread=spread, valid=valid, clear=clear)

    @torch.no_grad()
    def probed(self, labels: Tensor, weights: Tensor, output: ModelOutput) -> Observation:
        """The observation of clean, unmixed images: labels (b,) int64, weights (b,), 0 = padding or broken image. Right when the argmax
        is the label; loss: cross entropy without smoothing. A row whose logits are not finite is not valid."""
        if not isinstance(output.logits, Tensor):
            raise ConfigError(
                "examples.rule=probe: the model returns two logits (distillation); choose a model without distillation"
            )
        logits = output.logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        valid = (weights > 0) & losses.isfinite()
        spread = spread_of(output)
        return Observation(
            logits.argmax(dim=-1) == labels, losses, torch.zeros_like(losses) if spread is None else spread, valid
        )


@torch.no_grad()
def spread_of(output: ModelOutput) -> Tensor | None:
    """(b,) variance of the last block's [CLS] attention times n_last^2, so that it is comparable across token counts; None without it."""
    if output.cls_attention is None:
        return None
    attention = output.cls_attention.float()
    return attention.var(dim=1, correction=0) * attention.shape[1] ** 2


def _prediction(logits: Any) -> Tensor:
    """Logits (b, C) float32 as in evaluation: the mean of a pair, as in timm."""
    return logits.float() if isinstance(logits, Tensor) else torch.stack(logits).float().mean(dim=0)
