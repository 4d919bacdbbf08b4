"""Shared keys: all queries of an image attend to the same subset of keys, so less is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sparsity.settings import ConnectionSettings, Keep, Network, setting
from sparsity.tokens import scores
from sparsity.tokens.scores import among_patches, work
from sparsity.types import QKV, BlockShape, Plan, Tokens, VisibleKeys, num_kept


@dataclass(frozen=True)
class SharedKeysSettings(ConnectionSettings):
    keep: Keep = setting(1.0, "share of the keys that all queries of an image may see, once the schedule is through")

    def build(self, network: Network) -> SharedKeys:
        if not network.has_class_token:
            raise ValueError(
                "connections.method=shared_keys: this network has no [CLS] token to rank keys by; choose "
                "connections.method=shared_keys_column"
            )
        return SharedKeys("cls")


@dataclass(frozen=True)
class SharedKeysColumnSettings(SharedKeysSettings):
    def build(self, network: Network) -> SharedKeys:
        return SharedKeys("column")


@dataclass(frozen=True)
class SharedKeys:
    """m keys of each image for all its queries, ranked by the [CLS] row, or by the column mean of P.

    The column mean uses every query, but needs the full map in the selecting blocks: at 224 px that costs a fifth of the saving.
    """

    by_counts: ClassVar[bool] = True
    by: Literal["cls", "column"] = "cls"

    @torch.no_grad()
    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> Tokens:
        num, p = tokens.ids.shape[1], tokens.num_prefix
        num_keys = num_kept(num, plan.keep_connections)
        if num_keys == num:
            return tokens.with_(keys=None)
        value = scores.cls_row(tokens, qkv) if self.by == "cls" else among_patches(tokens, qkv).mean(dim=1)  # (B, k)
        chosen = scores.ranked(value)[:, :num_keys].sort(dim=1).values
        prefix = torch.arange(p, device=chosen.device).expand(chosen.shape[0], -1)
        return tokens.with_(keys=VisibleKeys(index=torch.cat((prefix, chosen + p), dim=1)))

    def visible(self, num_patches: int, plan: Plan) -> int:
        return num_kept(num_patches, plan.keep_connections)

    def work(self, shape: BlockShape, plan: Plan) -> int:
        return work(shape, plan, 1 if self.by == "cls" else shape.num_prefix + shape.num_patches)
