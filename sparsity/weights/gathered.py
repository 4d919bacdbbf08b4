"""A linear layer in block form, computed: each row of blocks gathers its kept input columns and multiplies them by a small dense matrix.

It computes keep x the multiply-adds of the dense layer in R small products instead of a large one; whether that is faster depends on
the device, p and the batch (`trilevel bench inference CONFIG --forms block`). N rows of the input; O, I, p, q, R, C as in `groups`.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparsity.weights.groups import Block
from sparsity.weights.pruning import Pruning


class GatheredLinear(nn.Module):
    """The layer of `site` with its pruned `weight` (O, I); kept: (R C, q) bool. Raises ValueError for rows of groups, and unless every row
    of blocks keeps as many columns (`weights.per=block`)."""

    index: Tensor
    weight: Tensor

    def __init__(self, site: Block, weight: Tensor, kept: Tensor, bias: Tensor | None = None):
        super().__init__()
        rows, p, columns, q = site.grid
        by_row = kept.view(rows, -1)
        counts = by_row.sum(1)
        if site.axis != 1 or int(counts.min()) != int(counts.max()):
            raise ValueError(
                f"{site.name}: only columns of blocks that keep equal numbers are gathered; set weights.groups=columns, weights.per=block"
            )
        self.outputs, self.rows, self.num = site.outputs, rows, int(counts[0])
        index = by_row.nonzero()[:, 1].view(rows, self.num)  # of input columns
        blocks = site.blocks(weight.detach()).reshape(rows, p, columns * q)
        part = blocks.gather(2, index[:, None].expand(rows, p, self.num))  # (R, p, K)
        self.register_buffer("index", index.flatten())
        self.register_buffer("weight", part.transpose(1, 2).contiguous())  # (R, K, p)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        columns = flat.index_select(1, self.index).view(len(flat), self.rows, self.num)
        products = torch.bmm(columns.transpose(0, 1), self.weight)  # (R, N, K) x (R, K, p)
        found = products.transpose(0, 1).reshape(len(flat), -1)[:, : self.outputs]
        found = found if self.bias is None else found + self.bias
        return found.reshape(*x.shape[:-1], self.outputs)


def gathered(vit: VisionTransformer, level: Pruning) -> VisionTransformer:
    """A copy of `vit` whose pruned layers are computed in block form. Raises ValueError as `GatheredLinear`, and for units and heads."""
    vit = copy.deepcopy(vit)
    modules = dict(vit.named_modules())
    for site in level.sites:
        if not isinstance(site, Block) or level.kept is None:
            raise ValueError(f"{site.name}: units and heads have no blocks; use the compact form")
        layer = cast(nn.Linear, modules[site.name])
        parent, _, name = site.name.rpartition(".")
        bias: Any = layer.bias
        setattr(modules[parent], name, GatheredLinear(site, layer.weight, level.kept[site.name], bias))
    return vit
