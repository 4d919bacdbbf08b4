"""Distillation: losses of one image between what the network and a frozen teacher make of it, in float32.

Of logits, DeiT (Touvron et al. 2021, arXiv 2012.12877, equations 2 and 3). Of tokens, SaiT (Li et al., arXiv 2210.05832; formula in
docs/methods.md, section Distillation). Letters: b rows of a micro-batch, C classes, n patch tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.types import ModelOutput

LEAST = torch.finfo(torch.float32).tiny  # below it an importance counts as this, whose logarithm is -87


def soft(logits: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(logits / tau)) of each row: two (b, C) -> (b,) float32, in nats.

    The argument order is that of DeiT's code, whose KL is also divided by C; this is the sum over classes, as in the paper.
    """
    ours, theirs = (F.log_softmax(one.float() / tau, dim=-1) for one in (logits, teacher))
    return tau**2 * (theirs.exp() * (theirs - ours)).sum(dim=-1)


def hard(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher predicts, without smoothing: two (b, C) -> (b,) float32, in nats."""
    return F.cross_entropy(logits.float(), teacher.argmax(dim=-1), reduction="none")


def tokens(importance: Tensor, attention: Tensor) -> Tensor:
    """KL(T || TIS) of each image: two (b, n) -> (b,) float32, in nats.

    importance: TIS, rows sum to 1, gets the gradient. attention: of the teacher's [CLS] over patches, here renormalised to T; no gradient.
    """
    target = attention.detach().float()
    target = target / target.sum(dim=1, keepdim=True)
    return (torch.xlogy(target, target) - torch.xlogy(target, importance.float().clamp(min=LEAST))).sum(dim=1)


@dataclass(frozen=True)
class Distillation:
    """The losses of a run with a teacher; without one the identity.

    logits, tau, alpha: kind of `soft` or `hard`, its temperature, and its share of the loss: (1 - alpha) labels + alpha distillation.
    tokens: weight of the loss of tokens, which is added. block: whose importance it uses.
    """

    logits: str = "none"
    tau: float = 1.0
    alpha: float = 0.5
    tokens: float = 0.0
    block: int = 0

    @property
    def outputs(self) -> frozenset[str]:
        """What the network must return beside its logits."""
        return frozenset({f"importance:{self.block}"} if self.tokens else ())

    @property
    def teacher_outputs(self) -> frozenset[str]:
        """What the teacher must return beside its logits."""
        return frozenset({"cls_attention"} if self.tokens else ())

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the losses of which the loss is made; () without a teacher."""
        found = [name for name, on in (("logits", self.logits != "none"), ("tokens", self.tokens > 0)) if on]
        return ("labels", *found) if found else ()

    def __call__(self, labels: Tensor, output: ModelOutput, taught: ModelOutput | None) -> tuple[Tensor, dict[str, Tensor]]:
        """labels: (b,) loss of the labels; output, taught: of the network and the teacher for the same images.

        Returns the loss of each row (b,) float32, and its parts by name, without gradient and without their weights.
        """
        if taught is None:
            return labels, {}
        loss, parts = labels, {"labels": labels}
        if self.logits != "none":
            own = distilled_logits(output.logits)
            parts["logits"] = soft(own, taught.logits, self.tau) if self.logits == "soft" else hard(own, taught.logits)
            loss = (1 - self.alpha) * labels + self.alpha * parts["logits"]
        if self.tokens:
            assert output.importance is not None and taught.cls_attention is not None
            parts["tokens"] = tokens(output.importance, taught.cls_attention)
            loss = loss + self.tokens * parts["tokens"]
        return loss, {name: part.detach() for name, part in parts.items()}


def distilled_logits(logits: Any) -> Tensor:
    """Those that learn from the teacher: of the distillation token, where a model in training returns a pair."""
    return logits if isinstance(logits, Tensor) else logits[1]
