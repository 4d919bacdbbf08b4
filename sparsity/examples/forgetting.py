"""Forgetting-based curriculum: level 1 of Tri-Level E-ViT (Kong et al., AAAI 2023, arXiv 2211.10801; events after
Toneva et al., ICLR 2019, arXiv 1812.05159).

A random share of the data set (`removed`) is held in a pool. For the rest, the training forward pass gives
whether each example was right; right last time and wrong now is a forgetting event. Every `window` epochs, `updates` times, the
`swap` share that was forgotten least moves to the pool, and as many random examples return from it.

    score = events / max(seen - 1, 1) with seen >= 3;  never right in the window: +inf, never removed

Ties are broken by the variance of the last block's [CLS] attention (mean over the window, flattest map first), then by id.
`seen` counts observations: presentations, or the probes of the rule `probe`.
Differences from the authors' code: one permutation for all ranks, events counted on the gathered stream, everything in the checkpoint; with
`restore` = never_trained, examples that were never shown return first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sparsity.examples.by_class import first_per_group, quotas
from sparsity.examples.curriculum import Draw, ExampleSettings, Observer, TrainingRun
from sparsity.examples.observations import Observed
from sparsity.settings import ByRun, Count, Epochs, RunLength, Share, setting
from sparsity.types import Selection

FEWEST_SEEN = 3  # presentations required for a score
RIGHT, LEARNED = np.uint8(1), np.uint8(2)  # bits of `memory`: right last time, right at least once in this window


def _window(run: RunLength, given: Mapping[str, float]) -> float:
    """A tenth of the run, as 30 of 300 epochs; whole passes, and enough observations for a score."""
    passes = max(round(run.epochs / 10 / run.repeats), FEWEST_SEEN)
    if share := given.get("probe_share"):
        passes = max(passes, math.ceil(FEWEST_SEEN / share / run.repeats - 1e-9))
    return float(passes * run.repeats)


def _updates(run: RunLength, given: Mapping[str, float]) -> int:
    """Those of the first half of the run, as 5 in 150 of 300 epochs."""
    return min(5, max(1, int(run.epochs / 2 // given["window"]))) if given.get("window") else 5


@dataclass(frozen=True)
class ForgettingSettings(ExampleSettings):
    counts_forgetting: ClassVar[bool] = True
    removed: Share = setting(0.0, "share of the data set left out of an epoch")
    swap: Share = setting(0.05, "share of the data set exchanged at an update")
    window: Epochs = setting(
        30.0,
        "epochs between two updates, in which forgetting events are counted",
        ByRun("epochs / 10, at least 3 x data.repeats", _window),
    )
    updates: Count = setting(5, "updates in a run", ByRun("5, or those of the first half of the run", _updates))
    restore: Literal["random", "never_trained"] = setting("random", "which examples come back from the pool first")
    ties: Literal["spread", "id"] = setting("spread", "equal scores: flattest [CLS] attention first, or lowest id first")
    balanced: bool = setting(False, "remove the same share of every class")
    anneal: Share = setting(0.0, "last share of the epochs, which shows every example")

    def build(self, run: TrainingRun) -> Forgetting:
        return Forgetting(self, run)

    def never_acts(self, run: RunLength) -> str:
        if why := super().never_acts(run):
            return why
        if not (self.removed and self.swap and self.updates) or self._updates_in(run):
            return ""
        end = self.all_from(*run)
        fits = (end - 1) // run.repeats * run.repeats
        shorter = f"set examples.window<={fits:g}ep, " if fits >= FEWEST_SEEN * run.repeats else "train for more epochs, "
        unit = "epoch" if end == 1 else "epochs"
        return (
            f"examples.window={self.window:g}ep: no update happens in the {end} {unit} that leave examples out, so the same images would "
            f"be left out for the whole run; {shorter}or examples.method=random_fixed, which does just that"
        )

    def acts_in_part(self, run: RunLength) -> list[str]:
        found = super().acts_in_part(run)
        number = self._updates_in(run)
        if off := next((key for key in ("updates", "swap") if self.removed and not getattr(self, key)), ""):
            found.append(
                f"examples.{off}=0: no example is ever exchanged, so the same ones are left out for the whole run and examples.window has "
                "no effect; examples.method=random_fixed does just that"
            )
        if self.removed and self.swap and number < self.updates:
            found.append(
                f"examples.updates={self.updates} with examples.window={self.window:g}ep: {number} of them in the "
                f"{self.all_from(*run)} epochs that leave examples out"
            )
        return found

    @property
    def reads_attention(self) -> tuple[str, str]:
        swaps = self.removed and self.swap and self.updates
        return ("examples.ties=spread", "set examples.ties=id") if self.ties == "spread" and swaps else ("", "")

    def _updates_in(self, run: RunLength) -> int:
        """The number of updates that a run reaches."""
        return min(self.updates, int(max(self.all_from(*run) - 1, 0) // self.window)) if self.window else self.updates


class Forgetting(Observer):
    """State per example: active (bool), events, seen (uint16), memory (2 bits), spread (float32 sum over the window)."""

    name = "forgetting"
    decides_state = ("ties", "restore")
    settings: ForgettingSettings

    def _start(self) -> None:
        s = self.settings
        self.num_swap = round(s.swap * self.num_examples)
        self._refuse()
        # without a pool or updates nothing is swapped: events are counted, ties never broken
        self.swaps = bool(self.num_removed and self.num_swap and s.updates)
        self.wants_spread = s.ties == "spread" and self.swaps
        self.active = self._starting_set()
        self.by_trained = s.restore == "never_trained"
        self.trained = (
            np.packbits(self.active, bitorder="little") if self.by_trained else np.zeros(0, np.uint8)
        )  # ever shown: bits
        self._forget_everything()
        if self.swaps and (possible := int(self._swappable().sum())) < self.num_swap:
            raise ValueError(
                f"examples.swap={s.swap} exchanges {self.num_swap} examples, but with examples.removed={s.removed} only "
                f"{possible} can be; set examples.swap<={possible / self.num_examples:.4g}, or change examples.removed"
            )

    def _refuse(self) -> None:
        s = self.settings
        if not s.removed or not s.updates or not s.swap:
            return
        if self.num_swap == 0:
            raise ValueError(
                f"examples.swap={s.swap} of {self.num_examples} examples is none; raise it, or set 0 to swap nothing"
            )
        if self.num_swap > self.num_removed:
            raise ValueError(
                f"examples.swap={s.swap} ({self.num_swap} examples) is more than the pool of examples.removed="
                f"{s.removed} ({self.num_removed}) holds; set examples.swap<={s.removed}, or raise examples.removed"
            )
        passes = s.window / self.repeats
        if passes != int(passes):
            raise ValueError(
                f"examples.window={s.window:g}ep must be a multiple of data.repeats={self.repeats} epochs: an update "
                f"falls between two passes over the kept examples; try {max(round(passes), FEWEST_SEEN) * self.repeats}ep"
            )
        if self.probe_share is not None:
            self._refuse_rare_probes(self.probe_share)
        elif passes < FEWEST_SEEN:
            raise ValueError(
                f"examples.window={s.window:g}ep with data.repeats={self.repeats} presents an example {passes:g} time(s) "
                f"between updates, a score requires {FEWEST_SEEN}; set examples.window>={FEWEST_SEEN * self.repeats}ep"
            )

    def _refuse_rare_probes(self, share: float) -> None:
        window = self.settings.window
        if window * share < FEWEST_SEEN - 1e-9:
            raise ValueError(
                f"examples.probe_share={share:g} with examples.window={window:g}ep observes an example {window * share:.3g} time(s) "
                f"between updates, a score requires {FEWEST_SEEN}; set examples.probe_share>={FEWEST_SEEN / max(window, FEWEST_SEEN):.4g}, "
                f"or examples.window>={FEWEST_SEEN / share:.4g}ep"
            )

    def uses_observations(self, epoch: int) -> bool:
        return not self.swaps or (super().uses_observations(epoch) and epoch < self.settings.updates * self.settings.window)

    def _forget_everything(self) -> None:
        n = self.num_examples
        self.events, self.seen = np.zeros(n, np.uint16), np.zeros(n, np.uint16)
        self.memory = np.zeros(n, np.uint8)
        self.spread = np.zeros(n if self.wants_spread else 0, np.float32)

    def _update_statistics(self, observed: Observed) -> None:
        ids, correct = observed.ids, observed.correct
        before = self.memory[ids]
        self.events[ids] += (before & RIGHT).astype(bool) & ~correct
        self.seen[ids] += np.uint16(1)
        self.memory[ids] = (before & LEARNED) | correct * (RIGHT | LEARNED)
        if observed.value is not None:
            self.spread[ids] += observed.value

    def scores(self) -> np.ndarray:
        """(N,) float64: events per chance to forget in this window; +inf: never right; NaN: fewer than 3 presentations."""
        score = self.events / np.maximum(self.seen.astype(np.int64) - 1, 1)
        score[(self.memory & LEARNED) == 0] = np.inf
        score[self.seen < FEWEST_SEEN] = np.nan
        return score

    def _select(self, epoch: int) -> Selection:
        due = min(int(epoch // self.settings.window), self.settings.updates) if self.swaps else 0
        if due <= self.updated:
            return self._selection(self.active)
        self.updated = due
        facts = self._update(due)
        return self._selection(self.active, **facts)

    def _update(self, number: int) -> dict[str, Any]:
        """Exchange the least forgotten for random examples of the pool, and reset the statistics. |active| stays constant."""
        score = self.scores()
        scored = np.flatnonzero(self.active & np.isfinite(score))
        ties = self.spread[scored] / self.seen[scored] if self.wants_spread else np.zeros(len(scored))
        easiest_first = scored[np.lexsort((scored, ties, score[scored]))]
        quota = np.minimum(self._quota(), np.bincount(self.group[scored], minlength=len(self._quota())))
        out = first_per_group(easiest_first, self.group, quota)
        pool = self._draw(Draw.RESTORED, number).permutation(np.flatnonzero(~self.active))
        if self.by_trained:
            trained = np.unpackbits(self.trained, count=self.num_examples, bitorder="little")
            pool = pool[np.argsort(trained[pool], kind="stable")]
        back = first_per_group(pool, self.group, quota)
        facts = {
            "swapped": len(out),
            "scored": len(scored),
            "unforgettable": int((score[scored] == 0).sum()),
            "never_learned": int((self.active & np.isinf(score)).sum()),
            "cut": float(score[out].max()) if len(out) else 0.0,
        }
        self.active[out] = False
        self.active[back] = True
        if self.by_trained:
            self.trained |= np.packbits(self.active, bitorder="little")
        self._forget_everything()
        return facts

    def _swappable(self) -> np.ndarray:
        """(G,) number of examples of each group that can be swapped."""
        sizes = np.bincount(self.group)
        active = np.bincount(self.group[self.active], minlength=len(sizes))
        return np.minimum(active, sizes - active)

    def _quota(self) -> np.ndarray:
        return quotas(self._swappable(), self.num_swap)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "active": np.packbits(self.active, bitorder="little"),
            "events": self.events,
            "seen": self.seen,
            "memory": self.memory,
            "spread": self.spread,
            "updated": np.array(self.updated),
        } | ({"trained": self.trained} if self.by_trained else {})

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.active = np.unpackbits(state["active"], count=self.num_examples, bitorder="little").astype(bool)
        if self.by_trained:
            self.trained = np.array(state["trained"], dtype=np.uint8)
        self.events, self.seen, self.memory, self.spread = (
            np.array(state[k], dtype=getattr(self, k).dtype) for k in ("events", "seen", "memory", "spread")
        )
        self.updated = int(state["updated"])
