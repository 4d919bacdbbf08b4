"""Random subsets, the baselines of level 1: one for the whole run, or a new one each epoch.

Random per epoch is RS2 without replacement (Okanovic et al., "Repeated Random Sampling for Minimizing the Time-to-Accuracy
of Learning", arXiv 2305.18424): epochs take consecutive parts of a permutation, which is redrawn when no whole part is left, so
keeping a third shows every example once in three epochs. Balanced draws do that class by class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsity.examples.by_class import first_per_group, quotas
from sparsity.examples.curriculum import Curriculum, Draw, ExampleSettings, TrainingRun
from sparsity.settings import Share, setting
from sparsity.types import Selection


@dataclass(frozen=True)
class RandomFixedSettings(ExampleSettings):
    removed: Share = setting(0.0, "share of the data set left out of an epoch")
    balanced: bool = setting(False, "remove the same share of every class")
    anneal: Share = setting(0.0, "last share of the epochs, which shows every example")

    def build(self, run: TrainingRun) -> Curriculum:
        return RandomFixed(self, run)


@dataclass(frozen=True)
class RandomEpochSettings(RandomFixedSettings):
    def build(self, run: TrainingRun) -> Curriculum:
        return RandomEpoch(self, run)


class RandomFixed(Curriculum):
    """The same random share for the whole run: forgetting's active set before its first update."""

    name = "random_fixed"

    def _start(self) -> None:
        self.active = self._starting_set()

    def _select(self, epoch: int) -> Selection:
        return self._selection(self.active)


class RandomEpoch(Curriculum):
    """A new random share each epoch (each round of `repeats` epochs)."""

    name = "random_epoch"

    def _select(self, epoch: int) -> Selection:
        num_kept = self.num_examples - self.num_removed
        parts = self.num_examples // num_kept
        cycle, part = divmod(epoch // self.repeats, parts)
        order = self._draw(Draw.CYCLE, cycle).permutation(self.num_examples)
        keep = np.zeros(self.num_examples, dtype=bool)
        keep[first_per_group(order, self.group, quotas(np.bincount(self.group), num_kept), skip=part)] = True
        return self._selection(keep)
