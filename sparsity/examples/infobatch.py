"""InfoBatch, a comparison method of level 1 (Qin et al., ICLR 2024, arXiv 2303.04947): soft pruning below the mean loss.

Each epoch a random share `removed` of the examples whose latest loss lies below the mean is left out, and the others below
the mean get a larger weight, so that the expected gradient stays that of the whole data set. The last `anneal` share of the epochs
shows everything.
`removed` is the paper's r: of those below the mean, not of the data set; the resulting share is in the facts ("kept_share").
Unlike in the authors' code, ids are integers: there they are gathered with the losses in one tensor of the losses' dtype, and
in bfloat16 id 1281166 becomes 1277952. See docs/methods.md, section Examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsity.examples.curriculum import Draw, ExampleSettings, Observer, TrainingRun
from sparsity.examples.observations import Observed
from sparsity.settings import RunLength, Share, setting
from sparsity.types import Selection


@dataclass(frozen=True)
class InfoBatchSettings(ExampleSettings):
    """It prunes by loss and corrects by weight, so `balanced` does not apply."""

    shares_known: ClassVar[bool] = False
    removed: Share = setting(0.0, "share left out of the examples whose loss is below the mean (the paper's r)")
    anneal: Share = setting(0.0, "last share of the epochs, which shows every example")

    @property
    def summary(self) -> str:
        return f"removed {self.removed:g} of those below the mean loss"

    def build(self, run: TrainingRun) -> InfoBatch:
        return InfoBatch(self, run)

    def never_acts(self, run: RunLength) -> str:
        if why := super().never_acts(run):
            return why
        if self.removed and self.all_from(*run) <= run.repeats:
            return (
                f"examples.method=infobatch: the first {run.repeats} epoch(s) measure the losses and show every example, and no other "
                "epoch leaves any out; train for more epochs, lower examples.anneal, or set examples.method=all"
            )
        return ""


class InfoBatch(Observer):
    """State: the latest loss of each example (float32, NaN = never shown) and the selection of the current round of epochs."""

    name = "infobatch"
    observes = "loss"
    settings: InfoBatchSettings

    def _start(self) -> None:
        self.loss = np.full(self.num_examples, np.nan, np.float32)
        self.keep = np.ones(self.num_examples, dtype=bool)
        self.below = np.zeros(self.num_examples, dtype=bool)
        self.updated = -1  # the round of epochs of the current selection

    def _update_statistics(self, observed: Observed) -> None:
        assert observed.value is not None
        self.loss[observed.ids] = observed.value

    def _select(self, epoch: int) -> Selection:
        if epoch // self.repeats != self.updated:
            self.updated = epoch // self.repeats
            self._prune()
        kept_below = int((self.below & self.keep).sum())
        weight = None
        if kept_below < int(self.below.sum()):
            # 1 / (1 - r), exact for the number left out after rounding
            weight = np.where(self.below, np.float32(self.below.sum() / kept_below), np.float32(1.0))
        return self._selection(self.keep, weight, below_mean=int(self.below.sum()))

    def _prune(self) -> None:
        observed = np.isfinite(self.loss)
        mean = self.loss[observed].mean(dtype=np.float64) if observed.any() else -np.inf
        self.below = observed & (self.loss < mean)
        candidates = self._draw(Draw.PRUNED, self.updated).permutation(np.flatnonzero(self.below))
        self.keep = np.ones(self.num_examples, dtype=bool)
        self.keep[candidates[: int(self.settings.removed * len(candidates))]] = False

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "loss": self.loss,
            "keep": np.packbits(self.keep, bitorder="little"),
            "below": np.packbits(self.below, bitorder="little"),
            "updated": np.array(self.updated),
        }

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.loss = np.array(state["loss"], dtype=np.float32)
        self.keep, self.below = (
            np.unpackbits(state[k], count=self.num_examples, bitorder="little").astype(bool) for k in ("keep", "below")
        )
        self.updated = int(state["updated"])
