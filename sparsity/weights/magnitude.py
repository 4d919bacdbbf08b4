"""Magnitude pruning: dense until `prune`, then the groups with the least energy are pruned and the rest is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsity.weights.groups import Site, Weights
from sparsity.weights.projection import kept_groups
from sparsity.weights.pruning import PruneSettings, Pruning


class Magnitude(Pruning):
    """Dense until `prune`; then the groups with the least energy are pruned. The penalties add what happens before."""

    def __init__(self, settings: PruneSettings, sites: Sequence[Site]):
        super().__init__()
        self.settings, self.sites = settings, sites

    def begin_epoch(self, epoch: int, weights: Callable[[], Weights]) -> str:
        if self.kept is not None:
            return ""
        if epoch >= self.settings.prune:
            self.kept = self._chosen(weights())
            self._release()
            return "pruned"
        return self._penalise(epoch, weights)

    def _chosen(self, weights: Weights) -> dict[str, Tensor]:
        return kept_groups(self.sites, weights, self.settings.keep, self.settings.per)

    def _penalise(self, epoch: int, weights: Callable[[], Weights]) -> str:
        """Update the penalty if that is due: "updated" or ""."""
        return ""

    def _release(self) -> None:
        """Drop the penalty's state."""


@dataclass(frozen=True)
class MagnitudeSettings(PruneSettings):
    def _build(self, sites: Sequence[Site]) -> Pruning:
        return Magnitude(self, sites)
