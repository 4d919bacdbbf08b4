"""Token merging (Bolya et al., ToMe, ICLR 2023): patches with similar keys are averaged, none is dropped.

Bipartite soft matching, section 3 of the paper: tokens go alternately to sets A and B; each of A draws one edge to its most similar of B
(cosine of the keys, mean over heads); the r strongest edges are merged, averages weighted by size. Attention then weights a
token by its number of patches (`attention.fused`). The prefix is never merged, and the tokens stay in the order [prefix, rest of A, B].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity.attention import gather_tokens
from sparsity.settings import Count, Keep, Network, TokenSettings, setting
from sparsity.tokens.scores import ranked
from sparsity.types import QKV, BlockShape, Plan, Tokens, num_kept


@dataclass(frozen=True)
class MergeSettings(TokenSettings):
    keep: Keep = setting(1.0, "share of the patch tokens that stays at each block of `blocks`, once the schedule is through")
    merged: Count = setting(0, "tokens merged per block wherever less than all is kept; 0 = as many as `keep` asks for")

    def refuse_keep(self, keep: float) -> None:
        if keep == 1.0:
            raise ValueError(
                "tokens.method=tome with tokens.keep=1.0 merges nothing; set the share to keep, e.g. tokens.keep=0.7"
            )

    @property
    def fixed_by(self) -> str:
        return f"tokens.merged={self.merged}" if self.merged else ""

    @property
    def dropped_are(self) -> str:
        return "merged into others"

    def build(self, network: Network) -> Merge:
        if network.global_pool not in ("token", "map", "prr"):
            raise ValueError(
                f"tokens.method=tome with global_pool={network.global_pool!r}: the mean would count a merged token once; choose "
                "tokens.method=topk"
            )
        return Merge(self.merged, network.carry_qkv)


@dataclass(frozen=True)
class Merge:
    """merged: r, tokens merged per block while the plan keeps less than all; 0: r follows the plan, n - ceil(n * keep).

    At most half of the patches of a block can be merged. carry_qkv as in `topk`.
    """

    by_counts: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    merged: int = 0
    carry_qkv: bool = True

    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> tuple[Tokens, QKV]:
        num = tokens.ids.shape[1]
        num_merged = num - self.count(num, plan)
        if num_merged == 0:
            return tokens, qkv
        return merge(tokens, qkv, num_merged, self.carry_qkv)

    def count(self, num_patches: int, plan: Plan) -> int:
        """Patch tokens after the merge."""
        if plan.keep_tokens == 1.0:
            return num_patches
        wanted = self.merged or num_patches - num_kept(num_patches, plan.keep_tokens)
        return num_patches - min(wanted, num_patches // 2)

    def work(self, shape: BlockShape, plan: Plan) -> int:
        """The edges between A and B, and the sums of merged tokens (x and sizes; with carry_qkv also q, k, v)."""
        num_merged = shape.num_patches - self.count(shape.num_patches, plan)
        b = (shape.num_patches + shape.num_prefix % 2) // 2
        summed = shape.width + 1 + (3 * shape.heads * shape.head_width if self.carry_qkv else 0)
        edges = (shape.num_patches - b) * b * shape.head_width
        return edges + b * num_merged * summed if num_merged else 0


def merge(tokens: Tokens, qkv: QKV, num_merged: int, carry_qkv: bool) -> tuple[Tokens, QKV]:
    """`num_merged` patches of A averaged into their nearest of B. A merged token has the id of its B, sizes add up."""
    p = tokens.num_prefix
    a, b = _sets(tokens)
    near, order = _match(tokens, qkv, a, b)
    source, rest = order[:, :num_merged], order[:, num_merged:].sort(dim=1).values
    nearest = near.gather(1, source)  # (B, r), positions in B
    # Sums by a matrix product, not by scatter: deterministic on every device.
    to = F.one_hot(nearest, b.shape[0]).transpose(1, 2).to(torch.float32)  # (B, |B|, r)
    prefix = torch.arange(p, device=a.device).expand(source.shape[0], -1)
    stay = torch.cat((prefix, a[rest]), dim=1)  # positions in T
    leave, into = a[source], b.expand(source.shape[0], -1)
    size = tokens.size if tokens.size is not None else torch.ones_like(tokens.x[..., 0], dtype=torch.float32)
    sums = size.gather(1, into) + (to @ size.gather(1, leave)[..., None])[..., 0]  # (B, |B|)

    def average(whole: Tensor, dim: int) -> Tensor:
        """Weighted by size along `dim`: (B, ..., T, ...) -> (B, ..., T - r, ...)."""
        shape = [size.shape[0]] + [1] * (whole.ndim - 1)
        weigh = lambda weights: weights.view(*shape[:dim], -1, *shape[dim + 1 :])  # noqa: E731
        moved = gather_tokens(whole, leave, dim).float() * weigh(size.gather(1, leave))
        matrix = to if dim == 1 else to[:, None]
        together = gather_tokens(whole, into, dim).float() * weigh(size.gather(1, into)) + matrix @ moved
        return torch.cat((gather_tokens(whole, stay, dim), (together / weigh(sums)).to(whole.dtype)), dim=dim)

    with torch.autocast(tokens.x.device.type, enabled=False):
        after = tokens.with_(
            x=average(tokens.x, 1),
            ids=torch.cat((tokens.ids.gather(1, a[rest] - p), tokens.ids.gather(1, into - p)), dim=1),
            size=torch.cat((size.gather(1, stay), sums), dim=1),
            keys=None,
        )
        if not carry_qkv:
            return after, qkv
        return after, QKV(average(qkv.q, 2), average(qkv.k, 2), average(qkv.v, 2), qkv.scale)


def _sets(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Positions in T of the patches in A (even) and B (odd)."""
    positions = torch.arange(tokens.num_prefix, tokens.x.shape[1], device=tokens.x.device)
    first = tokens.num_prefix % 2
    return positions[first::2], positions[1 - first :: 2]


@torch.no_grad()
def _match(tokens: Tokens, qkv: QKV, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of A its nearest in B, and A sorted from the strongest edge to the weakest; (B, |A|) positions in B and in A."""
    with torch.autocast(tokens.x.device.type, enabled=False):
        metric = F.normalize(qkv.k.float().mean(dim=1), dim=-1)  # (B, T, d)
        edges = metric[:, a] @ metric[:, b].transpose(1, 2)  # (B, |A|, |B|)
        strongest, near = edges.max(dim=-1)
    return near, ranked(strongest)
