"""Level 4: which weights are kept, by method name. A new method is one file and one row in `WEIGHTS`.

In: a network's layers, whole parameters at the start of an epoch, the learning rate of a step.
Out: masks, new values after a step, state for a checkpoint.
Never: knows how parameters are partitioned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from sparsity.weights.admm import AdmmSettings
from sparsity.weights.group_lasso import GroupLassoSettings
from sparsity.weights.magnitude import MagnitudeSettings
from sparsity.weights.pruning import Pruning, WeightSettings


@dataclass(frozen=True)
class KeepAllWeightsSettings(WeightSettings):
    off: ClassVar[bool] = True

    def build(self, vit: nn.Module) -> Pruning:
        return Pruning()


WEIGHTS: dict[str, type[WeightSettings]] = {
    "all": KeepAllWeightsSettings,
    "magnitude": MagnitudeSettings,
    "group_lasso": GroupLassoSettings,
    "admm": AdmmSettings,
}
