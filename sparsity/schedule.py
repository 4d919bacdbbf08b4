"""What a step keeps, as a pure function of progress (epochs done, fractions counted), so that all ranks agree and a resume needs no state.

Every distinct plan is another shape of network, and under torch.compile another graph: the way down is quantised to few plateaus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparsity.types import DENSE, Plan

Stairs = Sequence[tuple[float, float, float]]
"""(from epoch, keep_tokens, keep_connections), epochs rising."""


@dataclass(frozen=True)
class KeepSchedule:
    """How a run comes to its final keeps. method: a name in PLANS; warmup, length: epochs; the keeps are where a cosine ends.

    plateaus: distinct plans on the way down, 0 = every step its own. Raises ValueError for an unknown method, for keeps outside (0, 1] and
    for a staircase without stairs or out of order.
    """

    method: str = "constant"
    keep_tokens: float = 1.0
    keep_connections: float = 1.0
    warmup: float = 10.0
    length: float = 100.0
    plateaus: int = 8
    stairs: Stairs = ()

    def __post_init__(self) -> None:
        if self.method not in PLANS:
            raise ValueError(f"plan.method={self.method!r}: unknown; there are {', '.join(PLANS)}")
        starts = [start for start, _, _ in self.stairs]
        if self.method == "staircase" and (not starts or any(later <= earlier for earlier, later in pairwise(starts))):
            raise ValueError(
                f"plan.stairs={list(self.stairs)}: write [from epoch, keep tokens, keep connections], epochs rising"
            )
        _ = self.final

    @property
    def final(self) -> Plan:
        return Plan(self.keep_tokens, self.keep_connections)

    def at(self, progress: float) -> Plan:
        """The plan at `progress`, in epochs."""
        return PLANS[self.method](progress, self)

    def changes(self, epochs: float) -> list[tuple[float, Plan]]:
        """Where the plan changes in a run of `epochs`: [(from progress, plan)], from progress 0 on, each plan distinct from the one before.

        With `plateaus=0` a cosine changes at every step; then it is listed as it is at the start of each epoch.
        """
        down = range(self.plateaus + 1)
        cosine = (
            [self.warmup + self.length * step / self.plateaus for step in down] if self.plateaus else range(math.ceil(epochs))
        )
        borders = {
            "cosine": [self.warmup, *cosine, self.warmup + self.length],
            "staircase": [start for start, _, _ in self.stairs],
        }
        found: list[tuple[float, Plan]] = []
        for progress in sorted({0.0, *borders.get(self.method, [])}):
            now = self.at(progress)
            if progress < epochs and (not found or found[-1][1] != now):
                found.append((progress, now))
        return found


def _constant(progress: float, schedule: KeepSchedule) -> Plan:
    return schedule.final


def _cosine(progress: float, schedule: KeepSchedule) -> Plan:
    """b + (1 - b) (1 + cos(pi u)) / 2, u = (progress - warmup) / length (EViT's cosine; docs/methods.md, section Schedule).

    Quantised: each of `plateaus` equal stretches has the value of its middle, so the work over the run is that of the curve.
    """
    warmup, length, plateaus, final = schedule.warmup, schedule.length, schedule.plateaus, schedule.final
    if progress < warmup or final == DENSE:
        return DENSE
    if progress >= warmup + length:
        return final
    done = (progress - warmup) / length
    if plateaus:
        # The stretch is counted from its border as `changes` writes it, so that both agree to the last bit.
        stretch = sum(progress >= warmup + length * step / plateaus for step in range(1, plateaus))
        done = (stretch + 0.5) / plateaus
    way = 0.5 * (1.0 + math.cos(math.pi * done))
    return Plan(*(b + (1.0 - b) * way for b in (final.keep_tokens, final.keep_connections)))


def _staircase(progress: float, schedule: KeepSchedule) -> Plan:
    reached = [Plan(tokens, connections) for start, tokens, connections in schedule.stairs if progress >= start]
    return reached[-1] if reached else DENSE


PLANS: dict[str, Callable[[float, KeepSchedule], Plan]] = {"constant": _constant, "cosine": _cosine, "staircase": _staircase}
