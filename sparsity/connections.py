"""Level 3: which keys the following blocks may see, from P, the head-mean attention among the kept patches (methods 1.3).

`exact` gives every query its own m = ceil(k * keep) largest keys, by a mask: faithful, and no faster than dense on any dense kernel.
`shared_keys` [ours] gives all queries of an image the same m keys, gathered: the attention that is left out really costs nothing.
Prefix tokens see and are seen by all, in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity import scores
from sparsity.topk import kept
from sparsity.types import Keys, Place, Plan, Seen, Tokens


@dataclass(frozen=True)
class ConnectAll:
    """The identity: all keys visible."""

    def __call__(self, tokens: Tokens, seen: Seen, plan: Plan) -> Tokens:
        return tokens

    def visible(self, num_patches: int, plan: Plan) -> int:
        return num_patches

    def work(self, place: Place, plan: Plan) -> int:
        return 0


@dataclass(frozen=True)
class ExactMask:
    """A mask (B, 1, T, T) with exactly m ones in every patch row (prefix apart), ties by index.

    authors: all keys whose P reaches the m-th largest [code], so a row full of ties at their epsilon turns dense.
    """

    authors: bool = False

    @torch.no_grad()
    def __call__(self, tokens: Tokens, seen: Seen, plan: Plan) -> Tokens:
        num, p = tokens.ids.shape[1], tokens.num_prefix
        num_keys = kept(num, plan.keep_connections)
        if num_keys == num:
            return tokens.with_(keys=None)
        among = _among_patches(tokens, seen)  # (B, k, k)
        if self.authors:
            mask = among >= among.topk(num_keys, dim=-1).values[..., -1:]
        else:
            mask = torch.zeros_like(among, dtype=torch.bool).scatter(-1, scores.ranked(among)[..., :num_keys], True)
        return tokens.with_(keys=Keys(mask=F.pad(mask, (p, 0, p, 0), value=True)[:, None]))

    def visible(self, num_patches: int, plan: Plan) -> int:
        return num_patches  # hidden ones are computed too

    def work(self, place: Place, plan: Plan) -> int:
        return _work(place, plan, place.num_prefix + place.num_patches)


@dataclass(frozen=True)
class SharedKeys:
    """m keys of each image for all its queries, ranked by the [CLS] row, or by the column mean of P.

    The column mean asks every query, but needs the full map in the selecting blocks: at 224 px that takes back a fifth of what is saved.
    """

    by: Literal["cls", "column"] = "cls"

    @torch.no_grad()
    def __call__(self, tokens: Tokens, seen: Seen, plan: Plan) -> Tokens:
        num, p = tokens.ids.shape[1], tokens.num_prefix
        num_keys = kept(num, plan.keep_connections)
        if num_keys == num:
            return tokens.with_(keys=None)
        value = scores.cls_row(tokens, seen) if self.by == "cls" else _among_patches(tokens, seen).mean(dim=1)  # (B, k)
        chosen = scores.ranked(value)[:, :num_keys].sort(dim=1).values
        prefix = torch.arange(p, device=chosen.device).expand(chosen.shape[0], -1)
        return tokens.with_(keys=Keys(index=torch.cat((prefix, chosen + p), dim=1)))

    def visible(self, num_patches: int, plan: Plan) -> int:
        return kept(num_patches, plan.keep_connections)

    def work(self, place: Place, plan: Plan) -> int:
        return _work(place, plan, 1 if self.by == "cls" else place.num_prefix + place.num_patches)


def _among_patches(tokens: Tokens, seen: Seen) -> Tensor:
    """P: softmax over the tokens that are left, mean over heads, patch rows and columns: (B, k, k) float32."""
    p = tokens.num_prefix
    whole = scores.rows(tokens, seen, None).mean(dim=1) if seen.attention is None else seen.attention
    return whole[:, p:, p:]


def _work(place: Place, plan: Plan, num_queries: int) -> int:
    """q K^T of `num_queries` rows, where any key is hidden at all."""
    if kept(place.num_patches, plan.keep_connections) == place.num_patches:
        return 0
    return num_queries * (place.num_prefix + place.num_patches) * place.heads * place.head_width
