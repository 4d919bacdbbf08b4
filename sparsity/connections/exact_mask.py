"""Level 3: the visible keys of the following blocks, from P, the head-mean attention among the kept patches
(docs/methods.md, section Connections).

`exact` gives every query its own m = ceil(k * keep) largest keys, by a mask: as in the paper, and not faster than dense attention.
`shared_keys` (ours, not in the paper) gives all queries of an image the same m keys, gathered: hidden keys are
not computed.
In both, prefix tokens attend to all tokens, and all tokens to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from sparsity.settings import ConnectionSettings, Keep, Network, setting
from sparsity.tokens import scores
from sparsity.tokens.scores import among_patches, work
from sparsity.types import QKV, BlockShape, Plan, Tokens, VisibleKeys, num_kept


@dataclass(frozen=True)
class ExactMaskSettings(ConnectionSettings):
    keep: Keep = setting(1.0, "share of the keys that each query may see, once the schedule is through")

    @property
    def in_reference_code(self) -> bool:
        return True

    def build(self, network: Network) -> ExactMask:
        return ExactMask(network.authors)


@dataclass(frozen=True)
class ExactMask:
    """A mask (B, 1, T, T) with exactly m ones in every patch row (prefix apart), ties by index.

    authors: all keys with P >= the m-th largest, as in Tri-Level's code, so a row of ties at epsilon becomes dense.
    """

    by_counts: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    authors: bool = False

    @torch.no_grad()
    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> Tokens:
        num, p = tokens.ids.shape[1], tokens.num_prefix
        num_keys = num_kept(num, plan.keep_connections)
        if num_keys == num:
            return tokens.with_(keys=None)
        among = among_patches(tokens, qkv)  # (B, k, k)
        if self.authors:
            mask = among >= among.topk(num_keys, dim=-1).values[..., -1:]
        else:
            mask = torch.zeros_like(among, dtype=torch.bool).scatter(-1, scores.ranked(among)[..., :num_keys], True)
        return tokens.with_(keys=VisibleKeys(mask=F.pad(mask, (p, 0, p, 0), value=True)[:, None]))

    def visible(self, num_patches: int, plan: Plan) -> int:
        return num_patches  # hidden keys are computed too

    def work(self, shape: BlockShape, plan: Plan) -> int:
        return work(shape, plan, shape.num_prefix + shape.num_patches)
