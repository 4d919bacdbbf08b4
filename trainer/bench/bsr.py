"""Form `bsr` of `bench inference --forms`: torch's block-sparse rows, for the benchmark alone. It keeps the share `weights.keep` of whole
p x q blocks, which no method here prunes, so that it has no top-1.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsity.weights.groups import Block
from sparsity.weights.pruning import Pruning


def whole_blocks(weight: Tensor, block: tuple[int, int], keep: float) -> Tensor:
    """Which blocks of a weight (O, I) the BSR form keeps, (R, C) bool: the share `keep` with the largest sums of squares. Raises ValueError
    where torch has no such form: blocks that do not divide the layer, and on a CPU (MKL) blocks that are not square."""
    (p, q), (outputs, inputs) = block, weight.shape
    if p != q:
        raise ValueError(f"bsr: blocks of {p} x {q} are not square, which torch needs on a CPU; set weights.block=[{p}, {p}]")
    if outputs % p or inputs % q:
        raise ValueError(f"bsr: blocks of {p} x {q} do not divide a layer of {outputs} x {inputs}; set weights.block")
    energy = weight.square().unflatten(0, (-1, p)).unflatten(2, (-1, q)).sum((1, 3))
    most = max(1, round(keep * energy.numel()))
    return torch.zeros(energy.numel(), dtype=torch.bool).scatter_(0, energy.flatten().topk(most).indices, True).view_as(energy)


class BsrLinear(nn.Module):
    """A linear layer whose weight is torch's BSR tensor (O, I). Outside autograd: its product is W x^T, as `F.linear` refuses inference
    tensors with it."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        found = (self.weight @ x.reshape(-1, x.shape[-1]).t()).t()
        return (found if self.bias is None else found + self.bias).reshape(*x.shape[:-1], -1)


def bsr(vit: nn.Module, level: Pruning, settings: Any) -> tuple[nn.Module, int]:
    """A copy of `vit` whose pruned layers are BSR tensors, and its bytes. settings: with `block` and `keep`. Raises ValueError for units
    and heads."""
    vit, (p, q) = copy.deepcopy(vit), settings.block
    modules, size = dict(vit.named_modules()), sum(one.numel() * one.element_size() for one in vit.parameters())
    for site in level.sites:
        if not isinstance(site, Block):
            raise ValueError(f"{site.name}: units and heads have no blocks; use the compact form")
        layer = cast(nn.Linear, modules[site.name])
        weight = layer.weight.detach()
        stays = whole_blocks(weight, (p, q), settings.keep).repeat_interleave(p, 0).repeat_interleave(q, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # BSR is in beta state
            sparse = (weight * stays).to_sparse_bsr((p, q))
        parts = (sparse.values(), sparse.crow_indices(), sparse.col_indices())
        size += sum(part.numel() * part.element_size() for part in parts) - weight.numel() * weight.element_size()
        parent, _, name = site.name.rpartition(".")
        setattr(modules[parent], name, BsrLinear(sparse, layer.bias))
    return vit, size
