"""Level 2 by score: the k = ceil(n * keep) best patches and all prefix tokens are kept, the rest is dropped (docs/methods.md,
section Tokens).

The score defines the method: [CLS] attention is Tri-Level's and EViT's, a random order is the control. With `fuse` (EViT,
Liang et al. 2022, section 3.2) the dropped tokens become one more token: their sum weighted by score, not renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsity.attention import gather_tokens
from sparsity.settings import Keep, Network, TokenSettings, setting
from sparsity.tokens import scores
from sparsity.tokens.scores import Score, ranked
from sparsity.types import QKV, BlockShape, Plan, Tokens, num_kept


@dataclass(frozen=True)
class TopKSettings(TokenSettings):
    ranks_by_importance: ClassVar[bool] = True
    keep: Keep = setting(1.0, "share of the patch tokens that stays at each block of `blocks`, once the schedule is through")
    fuse: bool = setting(False, "replace the dropped tokens by one, their sum weighted by score (EViT)")
    importance: Literal["default", "cls", "prefix", "received", "value_norm"] = setting(
        "default",
        "score of a token: cls, its attention from [CLS]; prefix, from all prefix tokens; received, from all tokens; value_norm, prefix x "
        "length of its value. default: prefix with position block, else cls; without [CLS] received",
    )

    @property
    def dropped_are(self) -> str:
        return "fused into one more token" if self.fuse else ""

    @property
    def in_reference_code(self) -> bool:
        return not self.fuse and self.importance in ("default", "cls")

    @property
    def windowed(self) -> Literal["received", ""]:
        return "received" if self.importance in ("default", "received") and not self.fuse else ""

    def score(self, network: Network) -> Score:
        """The score by name. Raises ValueError for one that needs prefix tokens where the network has none."""
        if self.importance in ("cls", "prefix") and not network.has_class_token:
            raise ValueError(
                f"tokens.importance={self.importance}: this network has no class token; set tokens.importance=received"
            )
        return scores.BY_NAME[self.importance_in(network)]

    def build(self, network: Network) -> TopK:
        return TopK(self.score(network), self.fuse, network.carry_qkv, network.authors)


@dataclass(frozen=True)
class RandomSettings(TokenSettings):
    keep: Keep = setting(1.0, "share of the patch tokens that stays at each block of `blocks`, once the schedule is through")
    fuse: bool = setting(False, "replace the dropped tokens by one, their sum weighted by score (EViT)")

    @property
    def dropped_are(self) -> str:
        return "fused into one more token" if self.fuse else ""

    @property
    def in_reference_code(self) -> bool:
        return False

    @property
    def windowed(self) -> Literal["random", ""]:
        return "" if self.fuse else "random"

    def build(self, network: Network) -> TopK:
        return TopK(scores.random, self.fuse, network.carry_qkv)


@dataclass(frozen=True)
class TopK:
    """score: ranks the patches. carry_qkv: gather q, k, v too, for a following level 3. authors: the order of tokens of
    Tri-Level's code.

    Ours keeps the order of the tokens, so that a later tie is broken by patch id, and does nothing if all are kept. The authors
    sort them by score, also if all are kept.
    """

    score: Score
    fuse: bool = False
    carry_qkv: bool = True
    authors: bool = False

    @property
    def by_counts(self) -> bool:
        return not self.fuse  # 16 patches, or 15 and a fused one, are as many

    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> tuple[Tokens, QKV]:
        num = tokens.ids.shape[1]
        num_left = num_kept(num, plan.keep_tokens)
        if num_left == num and not self.authors:
            return tokens, qkv
        if self.fuse:  # the fused token carries the gradient of the scores, as in EViT
            value = self.score(tokens, qkv)
        else:
            with torch.no_grad():
                value = self.score(tokens, qkv)
        order = ranked(value.detach())  # (B, n)
        chosen = order[:, :num_left] if self.authors else order[:, :num_left].sort(dim=1).values
        after, carried = select(tokens, qkv, chosen, self.carry_qkv)
        if self.fuse and num_left < num:
            after, carried = _with_fused(after, carried, tokens, qkv, value, order[:, num_left:], self.carry_qkv)
        return after, carried

    def count(self, num_patches: int, plan: Plan) -> int:
        """Patch tokens (a fused one included) after the selection."""
        num_left = num_kept(num_patches, plan.keep_tokens)
        return num_left + 1 if self.fuse and num_left < num_patches else num_left

    def work(self, shape: BlockShape, plan: Plan) -> int:
        """q K^T of the queries whose attention is the score: one row of [CLS], all rows of `received`, none of a random order."""
        if num_kept(shape.num_patches, plan.keep_tokens) == shape.num_patches:
            return 0
        return scores.NUM_QUERIES[self.score](shape) * (shape.num_prefix + shape.num_patches) * shape.heads * shape.head_width


def select(tokens: Tokens, qkv: QKV, chosen: Tensor, carry_qkv: bool) -> tuple[Tokens, QKV]:
    """The prefix and the patches at `chosen` (B, k), positions among the patches; keys of level 3 are cleared."""
    prefix = torch.arange(tokens.num_prefix, device=chosen.device).expand(chosen.shape[0], -1)
    index = torch.cat((prefix, chosen + tokens.num_prefix), dim=1)  # (B, p + k)
    after = tokens.with_(
        x=gather_tokens(tokens.x, index, 1),
        ids=tokens.ids.gather(1, chosen),
        size=None if tokens.size is None else tokens.size.gather(1, index),
        keys=None,
    )
    if not carry_qkv:
        return after, qkv
    attention = None if qkv.attention is None else gather_tokens(gather_tokens(qkv.attention, index, 1), index, 2)
    return after, QKV(
        gather_tokens(qkv.q, index, 2), gather_tokens(qkv.k, index, 2), gather_tokens(qkv.v, index, 2), qkv.scale, attention
    )


def _with_fused(
    after: Tokens, carried: QKV, tokens: Tokens, qkv: QKV, value: Tensor, dropped: Tensor, carry_qkv: bool
) -> tuple[Tokens, QKV]:
    """One more token at the end, id -1: the dropped (B, n - k) times their scores, summed; its q, k, v are weighted means (ours)."""
    index = dropped + tokens.num_prefix
    weights = value.gather(1, dropped)  # (B, n - k)
    fused = (gather_tokens(tokens.x, index, 1) * weights.to(tokens.x.dtype)[..., None]).sum(dim=1, keepdim=True)
    x = torch.cat((after.x, fused), dim=1)
    ids = torch.cat((after.ids, torch.full_like(after.ids[:, :1], -1)), dim=1)
    size = after.size
    if size is not None and tokens.size is not None:
        size = torch.cat((size, tokens.size.gather(1, index).sum(dim=1, keepdim=True)), dim=1)
    after = after.with_(x=x, ids=ids, size=size)
    if not carry_qkv:
        return after, carried
    total = weights.sum(dim=1, keepdim=True).clamp(
        min=torch.finfo(weights.dtype).tiny
    )  # after a sharp softmax all weights may be 0
    share = (weights / total).detach()

    def mean(kept: Tensor, whole: Tensor) -> Tensor:
        fused = (gather_tokens(whole, index, 2) * share[:, None, :, None].to(whole.dtype)).sum(dim=2, keepdim=True)
        return torch.cat((kept, fused), dim=2)

    return after, QKV(mean(carried.q, qkv.q), mean(carried.k, qkv.k), mean(carried.v, qkv.v), qkv.scale)
