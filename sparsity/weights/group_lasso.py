"""Reweighted group lasso: a penalty on each group, the stronger the less the group has, recomputed every few epochs.

    loss + lambda * sum over groups g of beta_g ||W_g||^2,   beta_g = m / (e_g + eps m)

(Yuan et al., "Mobile or FPGA?", ACM TECS 2022; reweighting: Candes, Wakin, Boyd, "Enhancing sparsity by reweighted l1 minimization", 2008.)
e_g is the mean square of the group's weights and m that of the layer. Ours: the paper has beta_g = 1 / (||W_g||^2 + eps); the m makes
`strength` independent of the layer's scale. Ours too: the penalty is part of the step, not of the loss, as AdamW's weight decay is, so
the optimizer does not rescale it: the proximal step W_g <- W_g / (1 + 2 lr lambda beta_g), whose fixed point is the optimum of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.settings import setting
from sparsity.weights.groups import Site, Weights
from sparsity.weights.magnitude import Magnitude
from sparsity.weights.projection import spread
from sparsity.weights.pruning import Factor, PenaltySettings, Pruning, due


@dataclass(frozen=True)
class GroupLassoSettings(PenaltySettings):
    strength: Factor = setting(
        0.5, "lambda, weight of the penalty: a group of the layer's mean square decays as fast as by twice that weight decay"
    )
    eps: Factor = setting(
        0.01, "share of the layer's mean square that is added to a group's: the weakest groups decay 1 / eps times as fast"
    )

    def _build(self, sites: Sequence[Site]) -> Pruning:
        return GroupLasso(self, sites)


def reweight(energy: Tensor, counts: Tensor, eps: float) -> Tensor:
    """beta of each group, (blocks, groups), from sums of squares; 0 for padding."""
    counts = counts.to(energy.dtype)
    mean = energy.sum() / counts.sum()
    tiny = torch.finfo(energy.dtype).tiny  # a layer of zeros
    beta = mean / (energy / counts.clamp(min=1) + eps * mean).clamp(min=tiny)
    return beta.masked_fill(counts == 0, 0.0)


def penalty(energy: Tensor, beta: Tensor) -> Tensor:
    """sum of beta_g ||W_g||^2 over the groups of a layer."""
    return (beta * energy).sum()


def shrunk(values: Tensor, beta: Tensor, strength: float, lr: float) -> Tensor:
    """The proximal step of the penalty: argmin over X of ||X - values||^2 / 2 + lr * strength * beta * ||X||^2."""
    return values / (1.0 + 2.0 * lr * strength * beta)


class GroupLasso(Magnitude):
    """beta of each group, from `start` to `prune`."""

    settings: GroupLassoSettings

    def __init__(self, settings: GroupLassoSettings, sites: Sequence[Site]):
        super().__init__(settings, sites)
        self.beta: dict[str, Tensor] = {}  # {site: (blocks, groups)}
        self._spread: dict[str, Tensor] = {}  # the same at every element, flat

    @property
    def moves(self) -> bool:
        return bool(self.beta)

    def _penalise(self, epoch: int, weights: Callable[[], Weights]) -> str:
        if not due(self.settings, epoch):
            return ""
        there = weights()
        energies = {site.name: site.energy(there) for site in self.sites}
        self._set(
            {
                site.name: reweight(energies[site.name], site.counts(energies[site.name]), self.settings.eps)
                for site in self.sites
            }
        )
        return "updated"

    def pulled(self, name: str, values: Tensor, begin: int, lr: float) -> Tensor:
        if not self.beta:
            return values
        beta = self._spread[name][begin : begin + len(values)].to(values.device)
        return shrunk(values, beta, self.settings.strength, lr)

    def _set(self, beta: dict[str, Tensor]) -> None:
        self.beta = beta
        self._spread = {name: whole.flatten() for name, whole in spread(self.sites, beta).items()} if beta else {}

    def _release(self) -> None:
        self._set({})

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {f"beta.{name}": value.cpu() for name, value in self.beta.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        super().load_state_dict(state, device)
        self._set({name.removeprefix("beta."): value.to(device) for name, value in state.items() if name.startswith("beta.")})
