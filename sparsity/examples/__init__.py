"""Level 1: which examples an epoch shows, by method name. A new method is one file and one row in `EXAMPLES`.

In: what a training step observed (ids, correctness, loss).
Out: a `Selection` per epoch, equal on all ranks.
Never: reads data or knows ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsity.examples.curriculum import Curriculum, ExampleSettings, TrainingRun
from sparsity.examples.forgetting import ForgettingSettings
from sparsity.examples.infobatch import InfoBatchSettings
from sparsity.examples.probe import ProbeSettings
from sparsity.examples.random_subset import RandomEpochSettings, RandomFixedSettings
from sparsity.settings import Settings
from sparsity.types import Selection


@dataclass(frozen=True)
class AllSettings(ExampleSettings):
    off: ClassVar[bool] = True

    def build(self, run: TrainingRun) -> All:
        return All(self, run)


class All(Curriculum):
    """The identity: every example in every epoch."""

    name = "all"

    def _select(self, epoch: int) -> Selection:
        return self._everything()


EXAMPLES: dict[str, type[ExampleSettings]] = {
    "all": AllSettings,
    "forgetting": ForgettingSettings,
    "infobatch": InfoBatchSettings,
    "random_fixed": RandomFixedSettings,
    "random_epoch": RandomEpochSettings,
}

# correctness rules (`examples.rule`) that have settings of their own
RULES: dict[str, type[Settings]] = {"probe": ProbeSettings}


def kept_ids(selection: Selection, num_examples: int) -> np.ndarray:
    """The ids an epoch shows, rising, (num_kept,) int64: the list to export."""
    return np.flatnonzero(np.unpackbits(selection.keep, count=num_examples, bitorder="little"))
