"""The keep ratios of a step, as a pure function of progress (epochs, with fractions), so that all ranks agree and a resume needs no state.

Every distinct plan has other tensor shapes, and under torch.compile another graph: the descent is quantised to few plateaus. The kinds
of SaiT draw the plan of a step from a few plans, keyed by (seed, step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from sparsity.plan_mix import PlanMix
from sparsity.settings import ByRun, Count, Epochs, Keep, Settings, Share, setting
from sparsity.types import DENSE, Plan

DENSITIES = (0.35, 0.5, 0.7)


@dataclass(frozen=True)
class PlanSettings(Settings):
    """Base of the schedules: the plan at `progress`, in epochs; `final` is the plan of the levels' settings."""

    section: ClassVar[str] = "plan"

    draws: ClassVar[bool] = False
    """Whether steps draw their plan from several."""

    def at(self, progress: float, final: Plan) -> Plan:
        """What a step at `progress` keeps; where plans are drawn, what an evaluation keeps."""
        raise NotImplementedError

    def mix(self, progress: float, final: Plan) -> PlanMix:
        """The plans of the steps at `progress`, each with its share of them."""
        return PlanMix.of(self.at(progress, final))

    def borders(self, epochs: int) -> Sequence[float]:
        """The points of progress, beside 0, at which the plan may change in a run of `epochs`."""
        return ()

    @property
    def ends_at(self) -> Plan | None:
        """The plan that the schedule itself ends with; None: that of the levels (`tokens.keep`, `connections.keep`)."""
        return None

    @property
    def timetable(self) -> str:
        """The settings that decide when keep ratios fall, as key=value; "" if they are at their final value from the start."""
        return ""

    @property
    def every_step_differs(self) -> str:
        """The setting that gives every step another plan, with a remedy; "" for few plans."""
        return ""


@dataclass(frozen=True)
class Constant(PlanSettings):
    """The final plan from the first step on."""

    def at(self, progress: float, final: Plan) -> Plan:
        return final


@dataclass(frozen=True)
class Cosine(PlanSettings):
    """b + (1 - b) (1 + cos(pi u)) / 2, u = (progress - warmup) / length, from dense to the final plan b (EViT's cosine;
    docs/methods.md, section Schedule).

    Quantised: each of `plateaus` equal stretches has the value of its middle, so the total work equals that of the curve.
    """

    warmup: Epochs = setting(
        10.0,
        "epochs with everything kept, before the way down",
        ByRun("epochs / 30", lambda run, given: round(run.epochs / 30, 3)),
    )
    length: Epochs = setting(
        100.0,
        "epochs from everything kept to the final keep ratios",
        ByRun("epochs / 3", lambda run, given: round(run.epochs / 3, 3)),
    )
    plateaus: Count = setting(8, "distinct plans on the way down, each its own compiled graph; 0 = every step its own")

    def at(self, progress: float, final: Plan) -> Plan:
        warmup, length, plateaus = self.warmup, self.length, self.plateaus
        if progress < warmup or final == DENSE:
            return DENSE
        if progress >= warmup + length:
            return final
        done = (progress - warmup) / length
        if plateaus:
            # The same expression as in `borders`, so that both agree to the last bit.
            stretch = sum(progress >= warmup + length * step / plateaus for step in range(1, plateaus))
            done = (stretch + 0.5) / plateaus
        way = 0.5 * (1.0 + math.cos(math.pi * done))
        return Plan(*(b + (1.0 - b) * way for b in (final.keep_tokens, final.keep_connections)))

    def borders(self, epochs: int) -> Sequence[float]:
        """With `plateaus=0` the plan changes at every step; then the borders are the starts of the epochs."""
        down = range(self.plateaus + 1)
        between = (
            [self.warmup + self.length * step / self.plateaus for step in down] if self.plateaus else range(math.ceil(epochs))
        )
        return [self.warmup, *between, self.warmup + self.length]

    @property
    def timetable(self) -> str:
        return f"plan.warmup={self.warmup:g}ep, plan.length={self.length:g}ep"

    @property
    def every_step_differs(self) -> str:
        return "" if self.plateaus else "plan.plateaus=0: every step would compile another graph; set plan.plateaus=8"


@dataclass(frozen=True)
class Staircase(PlanSettings):
    """The keep ratios of the last stair reached; dense before the first."""

    stairs: tuple[tuple[Epochs, Keep, Keep], ...] = setting(
        (), "list of [from epoch, keep tokens, keep connections], epochs rising"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        starts = [start for start, _, _ in self.stairs]
        if not starts or any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(
                f"plan.stairs={[list(stair) for stair in self.stairs]}: use [from epoch, keep tokens, keep connections], epochs rising"
            )

    def at(self, progress: float, final: Plan) -> Plan:
        reached = [Plan(tokens, connections) for start, tokens, connections in self.stairs if progress >= start]
        return reached[-1] if reached else DENSE

    def borders(self, epochs: int) -> Sequence[float]:
        return [start for start, _, _ in self.stairs]

    @property
    def ends_at(self) -> Plan | None:
        return Plan(*self.stairs[-1][1:])

    @property
    def timetable(self) -> str:
        return f"plan.stairs from epochs {', '.join(f'{start:g}' for start, _, _ in self.stairs)}"


@dataclass(frozen=True)
class DenseSparse(PlanSettings):
    """Each step is dense, or has a density drawn from a list, keyed by (seed, step): one set of weights for many densities (SaiT;
    docs/methods.md, section Schedule). Evaluations use the final plan."""

    draws: ClassVar[bool] = True
    dense: Share = setting(0.5, "share of the steps that keep every token")
    densities: tuple[Keep, ...] = setting(DENSITIES, "keep ratios of tokens of the other steps, each equally likely")

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_densities(self.densities)

    def at(self, progress: float, final: Plan) -> Plan:
        return final

    def mix(self, progress: float, final: Plan) -> PlanMix:
        sparse = (1.0 - self.dense) / len(self.densities)
        parts = [(sparse, Plan(density, final.keep_connections)) for density in self.densities]
        return PlanMix(((self.dense, DENSE), *parts) if self.dense else tuple(parts))


@dataclass(frozen=True)
class DenseSparseEpochs(PlanSettings):
    """Odd epochs (the first, the third, ...) are dense; in even ones each step draws a density (the epoch form of SaiT's patent,
    US12299960B2)."""

    draws: ClassVar[bool] = True
    densities: tuple[Keep, ...] = setting(DENSITIES, "keep ratios of tokens of the steps of even epochs, each equally likely")

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_densities(self.densities)

    def at(self, progress: float, final: Plan) -> Plan:
        return final

    def mix(self, progress: float, final: Plan) -> PlanMix:
        if int(progress) % 2 == 0:
            return PlanMix.of(DENSE)
        share = 1.0 / len(self.densities)
        return PlanMix(tuple((share, Plan(density, final.keep_connections)) for density in self.densities))

    def borders(self, epochs: int) -> Sequence[float]:
        return range(epochs)

    @property
    def timetable(self) -> str:
        return "its first epoch is dense"


def _refuse_densities(densities: Sequence[float]) -> None:
    if not densities or 1.0 in densities or len(set(densities)) < len(densities):
        raise ValueError(
            f"plan.densities={list(densities)}: use distinct keep ratios of tokens below 1, e.g. {list(DENSITIES)}; the other steps are "
            "dense"
        )


PLANS: dict[str, type[PlanSettings]] = {
    "constant": Constant,
    "cosine": Cosine,
    "staircase": Staircase,
    "dense_sparse": DenseSparse,
    "dense_sparse_epochs": DenseSparseEpochs,
}


@dataclass(frozen=True)
class KeepSchedule:
    """The plans of a run, up to the final one. tokens, connections: whether levels 2 and 3 are on; a level that is off keeps all."""

    schedule: PlanSettings = Constant()
    final: Plan = DENSE
    tokens: bool = True
    connections: bool = True

    def at(self, progress: float) -> Plan:
        """The plan at `progress`, in epochs; where plans are drawn, that of evaluations."""
        return self._of_levels(self.schedule.at(progress, self.final))

    def mix(self, progress: float) -> PlanMix:
        """The plans that steps at `progress` draw from."""
        found = self.schedule.mix(progress, self.final)
        return PlanMix(tuple((share, self._of_levels(plan)) for share, plan in found.parts))

    @property
    def end(self) -> Plan:
        """The plan that the schedule leads to, which a short run may not reach."""
        return self._of_levels(self.schedule.ends_at or self.final)

    def _of_levels(self, plan: Plan) -> Plan:
        if self.tokens and self.connections:
            return plan
        return Plan(plan.keep_tokens if self.tokens else 1.0, plan.keep_connections if self.connections else 1.0)

    def changes(self, epochs: int) -> list[tuple[float, PlanMix]]:
        """The changes of plan in a run of `epochs`, from progress 0 on: [(from progress, plans)], no two in a row equal."""
        found: list[tuple[float, PlanMix]] = []
        for progress in sorted({0.0, *self.schedule.borders(epochs)}):
            now = self.mix(progress)
            if progress < epochs and (not found or found[-1][1] != now):
                found.append((progress, now))
        return found
