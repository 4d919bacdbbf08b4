"""Level 4 in numbers: the kept weights, in shares, bytes and multiply-adds, and how the groups' norms are spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsity.network import SparseNetwork
from sparsity.weights.groups import Weights
from sparsity.weights.pruning import Pruning
from sparsity.weights.stored import sizes, sizes_by_layer

WEAK = 0.1  # of the root mean square of a layer: a group below is nearly empty


def facts(level: Pruning, weights: Weights, model: SparseNetwork) -> dict[str, Any]:
    """Fields of a `weights` line. weights: the pruned parameters, whole.

    kept: share of the elements of the pruned layers. bytes: of these layers in float32, see `stored.sizes`. norms: 10, 50 and
    90 % quantiles of the groups' root mean square, relative to their layer's; weak: share of the groups below WEAK. multiply_adds: of an
    image's forward pass with every token that computes the kept weights only. layers: kept by layer. layer_bytes: as blocks, dense before
    `prune`.
    """
    masks = level.masks()
    elements = {site.name: sum(weights[name].numel() for name in site.shapes) for site in level.sites}
    kept = {
        site.name: sum(int(masks[name].sum()) if masks else weights[name].numel() for name in site.shapes)
        for site in level.sites
    }
    norms = relative_norms(level, weights)
    quantiles = torch.quantile(norms[torch.randperm(len(norms), generator=_fixed())[:100_000]], torch.tensor([0.1, 0.5, 0.9]))
    return {
        "kept": sum(kept.values()) / sum(elements.values()),
        "bytes": sizes(level),
        "norms": dict(zip(("low", "median", "high"), quantiles.tolist(), strict=True)),
        "weak": float((norms < WEAK).double().mean()),
        "multiply_adds": model.cost(left=level.shares()).total,
        "layers": {name: kept[name] / elements[name] for name in kept},
        "layer_bytes": {name: found.get("block", found["dense"]) for name, found in sizes_by_layer(level).items()},
    }


def relative_norms(level: Pruning, weights: Weights) -> Tensor:
    """The root mean square of every group relative to that of its layer, (groups,) float32 on the CPU."""
    found = []
    for site in level.sites:
        energy = site.energy(weights).float().cpu()
        counts = site.counts()
        whole = (energy.sum() / counts.sum()).clamp(min=torch.finfo(torch.float32).tiny)
        found.append((energy[counts > 0] / counts[counts > 0] / whole).sqrt())
    return torch.cat(found)


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)
