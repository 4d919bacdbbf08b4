"""Mass-based selection (SaiT, Li et al., arXiv 2210.05832): each image keeps the fewest patches whose importance sums to a mass.

An easy image has its importance on few patches and keeps few. Importance is float32 with stable sorts, because in bf16 about a quarter of
the rows of 196 tokens has a tie at the cut; its sums are float64, because in float32 a sharp row reaches 1 at its first patches and no
threshold could tell the others apart. The threshold for a wanted mean density is found by bisection over the cumulated importance of
training images (`threshold_for`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity.tokens.scores import ranked

TOLERANCE = 0.02  # of the mean density that a threshold reaches, in shares of the patches
LEAST = 16  # patches that every image keeps: a sharp [CLS] row may have its whole mass on one


class Ranked(NamedTuple):
    """order: (B, n) int64 positions of the patches, most important first. mass: (B, n) float64, importance of the first 1 .. n."""

    order: Tensor
    mass: Tensor


class Threshold(NamedTuple):
    """mass: the threshold in (0, 1]. density: the mean share of the patches that it keeps over the calibration images."""

    mass: float
    density: float


def rank(importance: Tensor) -> Ranked:
    """Cumulated importance: (B, n) float32 whose rows sum to 1 up to rounding -> `Ranked`."""
    order = ranked(importance.float())
    sorted_ = importance.double().gather(1, order)
    return Ranked(order, (sorted_ / sorted_.sum(dim=1, keepdim=True)).cumsum(dim=1))


def counts(mass: Tensor, threshold: float, least: int = LEAST) -> Tensor:
    """Patches that each image keeps: cumulated mass (B, n) -> (B,) int64, the smallest K whose first K have `threshold`, at least `least`.

    A threshold of 1 keeps all: rounding lets a cumulated sum reach 1 before the last patch. Raises ValueError outside (0, 1]."""
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"mass={threshold:g}: must be in (0, 1]; 1 keeps every token")
    num = mass.shape[1]
    if threshold == 1.0:
        return torch.full((len(mass),), num, dtype=torch.int64, device=mass.device)
    return ((mass.double() < threshold).sum(dim=1) + 1).clamp(min(least, num), num)


def refuse_density(density: float, num: int, least: int = LEAST) -> None:
    """Raises ValueError for a mean density of `num` patches outside (0, 1] or below the share of `least`."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density:g}: must be in (0, 1]")
    if density * num < min(least, num):
        remedy = f"use at least {least / num:.3g}" if least < num else "take a network with more patches"
        raise ValueError(f"density={density:g} of {num} tokens is less than the {least} that every image keeps; {remedy}")


def threshold_for(mass: Tensor, density: float, least: int = LEAST, steps: int = 60) -> Threshold:
    """The threshold that keeps a mean share `density` of the patches: cumulated mass of N images (N, n), by bisection.

    The mean jumps at each cumulated mass of an image. Of both sides of the jump at `density` it takes the one with the nearer mean, half
    way to the next mass, so that no image of the calibration stands at its own border. Raises ValueError for a density outside (0, 1],
    below the share of `least`, or that no threshold reaches within TOLERANCE."""
    num = mass.shape[1]
    refuse_density(density, num, least)
    if density == 1.0:
        return Threshold(1.0, 1.0)
    below, above = 0.0, 1.0
    for _ in range(steps):
        middle = (below + above) / 2
        if float(counts(mass, middle, least).double().mean()) / num < density:
            below = middle
        else:
            above = middle
    values = mass.double().unique().clamp(max=1.0)  # rising; a sum may end a rounding above 1
    at = min(int(torch.searchsorted(values, below)), len(values) - 1)
    around = [
        float(values[at - 1]) if at else 0.0,
        float(values[at]),
        float(values[at + 1]) if at + 1 < len(values) else 1.0,
    ]
    middles = [(first + second) / 2 for first, second in pairwise(around)]
    ends = [Threshold(m, float(counts(mass, m, least).double().mean()) / num) for m in middles]
    found = min(ends, key=lambda end: abs(end.density - density))
    if abs(found.density - density) > TOLERANCE:
        near = sorted({end.density for end in ends})
        raise ValueError(
            f"density={density:g}: no mass keeps it within {TOLERANCE:g}, the nearest keep {' and '.join(f'{one:.4g}' for one in near)} of "
            "the tokens on average, because many images have their importance on too few patches or rank them alike; use one of these "
            "densities, or another tokens.importance"
        )
    return found
