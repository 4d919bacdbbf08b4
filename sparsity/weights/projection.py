"""Which groups stay: the k best of each block, or those above one threshold per layer or for the whole network.

The Euclidean projection onto "at most k groups are not zero" keeps the k groups with the largest sums of squares (Yuan et al., "Mobile
or FPGA?", ACM TECS 2022, block-based column pruning); ties go to the lower index. Across blocks of different sizes, groups are ranked
by their mean square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsity.types import num_kept
from sparsity.weights.groups import Site, Weights


def kept_groups(sites: Sequence[Site], weights: Weights, keep: float, per: str) -> dict[str, Tensor]:
    """{name of the site: (blocks, groups) bool}. keep: share of the groups, in (0, 1]. per: what the share is of, "block", "layer" or
    "network". At least one group of every block (of every layer) stays; padding never does."""
    energies = {site.name: site.energy(weights) for site in sites}
    counts = {site.name: site.counts(energies[site.name]) for site in sites}
    if per == "block":
        return {name: best_of_each(energy, counts[name], keep) for name, energy in energies.items()}
    if per == "layer":
        return {name: above_one_threshold({name: energy}, counts, keep)[name] for name, energy in energies.items()}
    if per == "network":
        return above_one_threshold(energies, counts, keep)
    raise ValueError(f"weights.per={per!r}: unknown value; valid values: block, layer, network")


def best_of_each(energy: Tensor, count: Tensor, keep: float) -> Tensor:
    """The ceil(keep x groups) best groups of each block, (blocks, groups) bool; `count` is 0 where a group is padding."""
    there = count > 0
    order = energy.masked_fill(~there, -1.0).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (blocks, groups): place of each group in its block
    wanted = [num_kept(num, keep) for num in there.sum(1).tolist()]
    return (rank < torch.tensor(wanted, device=energy.device)[:, None]) & there


def share_of_blocks(sites: Sequence[Site], keep: float) -> tuple[float, int]:
    """The share of all groups that stays when `keep` of each block is rounded up, and the groups of the largest block."""
    there = [int(count) for site in sites for count in (site.counts() > 0).sum(1)]
    return sum(num_kept(count, keep) for count in there) / sum(there), max(there)


def above_one_threshold(energies: Mapping[str, Tensor], counts: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The ceil(keep x groups) best groups of all, by mean square; the best one of each layer always."""
    means = {name: (energy / counts[name]).masked_fill(counts[name] == 0, -1.0).flatten() for name, energy in energies.items()}
    everything = torch.cat(list(means.values()))
    num = num_kept(int((everything >= 0).sum()), keep)
    stays = torch.zeros_like(everything, dtype=torch.bool)
    stays[everything.argsort(descending=True, stable=True)[:num]] = True
    found = {}
    for (name, mean), part in zip(means.items(), stays.split([len(mean) for mean in means.values()]), strict=True):
        part[mean.argmax()] = True
        found[name] = part.view_as(energies[name])
    return found


def spread(sites: Sequence[Site], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of groups, {site: (blocks, groups)}, at every element: {parameter: its shape}."""
    return {parameter: whole for site in sites for parameter, whole in site.spread(values[site.name]).items()}
