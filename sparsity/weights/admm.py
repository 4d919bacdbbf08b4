"""ADMM: the weights W are pulled towards a pruned copy Z, with multipliers U that add up what is still missing.

    loss + rho / 2 ||W - Z + U||^2;   at the start U = 0, Z = P(W);   every few epochs Z = P(W + U), U = U + W - Z

(Zhang et al., "A systematic DNN weight pruning framework using ADMM", ECCV 2018; with blocks: Yuan et al., ACM TECS 2022; scaled form:
Boyd et al. 2011, section 3.1.1.) P keeps the groups with the largest sums of squares, see `projection`. Ours, as in `group_lasso`: the
pull is a proximal step after the optimizer's, W <- (W + lr rho (Z - U)) / (1 + lr rho), so that the optimizer does not rescale it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.settings import setting
from sparsity.weights.groups import Site, Weights
from sparsity.weights.magnitude import Magnitude
from sparsity.weights.projection import kept_groups, spread
from sparsity.weights.pruning import Factor, PenaltySettings, Pruning, due


@dataclass(frozen=True)
class AdmmSettings(PenaltySettings):
    rho: Factor = setting(
        5.0,
        "weight of the pull towards the pruned copy; over an epoch of s steps a share of about lr x rho x s of the gap closes",
    )

    def _build(self, sites: Sequence[Site]) -> Pruning:
        return Admm(self, sites)


def projected(sites: Sequence[Site], weights: Weights, keep: float, per: str) -> dict[str, Tensor]:
    """P: the weights with all but the kept groups set to zero."""
    stays = kept_groups(sites, weights, keep, per)
    masks = spread(sites, stays)
    return {name: torch.where(mask, weights[name], 0.0) for name, mask in masks.items()}


def update(
    weights: Weights, dual: Weights, project: Callable[[Weights], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Z and U from W and the U of before: Z = P(W + U), U = U + W - Z."""
    lifted = {name: weights[name] + value for name, value in dual.items()}
    copy = project(lifted)
    return copy, {name: lifted[name] - copy[name] for name in dual}


def pulled_to(values: Tensor, target: Tensor, rho: float, lr: float) -> Tensor:
    """The proximal step of the pull: argmin over X of ||X - values||^2 / 2 + lr * rho / 2 * ||X - target||^2; target = Z - U."""
    return (values + lr * rho * target) / (1.0 + lr * rho)


class Admm(Magnitude):
    """Z and U of every pruned parameter, from `start` to `prune`."""

    settings: AdmmSettings

    def __init__(self, settings: AdmmSettings, sites: Sequence[Site]):
        super().__init__(settings, sites)
        self.copy: dict[str, Tensor] = {}  # Z
        self.dual: dict[str, Tensor] = {}  # U
        self._target: dict[str, Tensor] = {}  # Z - U, flat

    @property
    def moves(self) -> bool:
        return bool(self.copy)

    def _penalise(self, epoch: int, weights: Callable[[], Weights]) -> str:
        if not due(self.settings, epoch):
            return ""
        there = {name: weight.detach().clone() for name, weight in weights().items()}
        if self.copy:
            self._set(*update(there, self.dual, self._project))
        else:
            self._set(self._project(there), {name: torch.zeros_like(there[name]) for name in self.parameters})
        return "updated"

    def _project(self, weights: Weights) -> dict[str, Tensor]:
        return projected(self.sites, weights, self.settings.keep, self.settings.per)

    def pulled(self, name: str, values: Tensor, begin: int, lr: float) -> Tensor:
        if not self.copy:
            return values
        target = self._target[name][begin : begin + len(values)].to(values.device)
        return pulled_to(values, target, self.settings.rho, lr)

    def _set(self, copy: dict[str, Tensor], dual: dict[str, Tensor]) -> None:
        self.copy, self.dual = copy, dual
        self._target = {name: (copy[name] - dual[name]).flatten() for name in copy}

    def _release(self) -> None:
        self._set({}, {})

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {f"copy.{name}": value.cpu() for name, value in self.copy.items()}
        return state | {f"dual.{name}": value.cpu() for name, value in self.dual.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        super().load_state_dict(state, device)

        def named(kind: str) -> dict[str, Tensor]:
            return {name.removeprefix(kind): value.to(device) for name, value in state.items() if name.startswith(kind)}

        self._set(named("copy."), named("dual."))
