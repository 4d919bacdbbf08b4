"""What a step keeps, as a pure function of progress (epochs done, fractions counted), so that all ranks agree and a resume needs no state.

Every distinct plan is another shape of network, and under torch.compile another graph: the way down is quantised to few plateaus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from sparsity.types import DENSE, Plan

Stairs = Sequence[tuple[float, float, float]]
"""(from epoch, keep_tokens, keep_connections), epochs rising."""


def plan(
    progress: float,
    *,
    method: str,
    keep_tokens: float = 1.0,
    keep_connections: float = 1.0,
    warmup: float = 10.0,
    length: float = 100.0,
    plateaus: int = 8,
    stairs: Stairs = (),
) -> Plan:
    """The plan at `progress`, in epochs. method: a name in PLANS; warmup, length: epochs; the keeps are where a cosine ends.

    Raises ValueError for an unknown method and for a staircase without stairs or out of order.
    """
    if method not in PLANS:
        raise ValueError(f"plan.method={method!r}: unknown; there are {', '.join(PLANS)}")
    final = Plan(keep_tokens, keep_connections)
    return PLANS[method](progress, final, warmup, length, plateaus, stairs)


def changes(
    epochs: float,
    *,
    method: str,
    keep_tokens: float = 1.0,
    keep_connections: float = 1.0,
    warmup: float = 10.0,
    length: float = 100.0,
    plateaus: int = 8,
    stairs: Stairs = (),
) -> list[tuple[float, Plan]]:
    """Where the plan changes in a run of `epochs`: [(from progress, plan)], beginning with progress 0, plans distinct from the one before.

    With `plateaus=0` a cosine changes at every step; then it is listed as it is at the start of each epoch.
    """
    cosine = [warmup + length * step / plateaus for step in range(plateaus + 1)] if plateaus else list(range(math.ceil(epochs)))
    borders = {"constant": [], "cosine": [warmup, *cosine, warmup + length], "staircase": [start for start, _, _ in stairs]}
    found: list[tuple[float, Plan]] = []
    for progress in sorted({0.0, *borders.get(method, [])}):
        now = plan(
            progress,
            method=method,
            keep_tokens=keep_tokens,
            keep_connections=keep_connections,
            warmup=warmup,
            length=length,
            plateaus=plateaus,
            stairs=stairs,
        )
        if progress < epochs and (not found or found[-1][1] != now):
            found.append((progress, now))
    return found


def _constant(progress: float, final: Plan, warmup: float, length: float, plateaus: int, stairs: Stairs) -> Plan:
    return final


def _cosine(progress: float, final: Plan, warmup: float, length: float, plateaus: int, stairs: Stairs) -> Plan:
    """b + (1 - b) (1 + cos(pi u)) / 2, u = (progress - warmup) / length (methods 1.2).

    Quantised: each of `plateaus` equal stretches has the value of its middle, so the work over the run is that of the curve.
    """
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


def _staircase(progress: float, final: Plan, warmup: float, length: float, plateaus: int, stairs: Stairs) -> Plan:
    starts = [start for start, _, _ in stairs]
    if not starts or any(later <= earlier for earlier, later in pairwise(starts)):
        raise ValueError(f"plan.stairs={list(stairs)}: write [from epoch, keep tokens, keep connections], epochs rising")
    reached = [Plan(tokens, connections) for start, tokens, connections in stairs if progress >= start]
    return reached[-1] if reached else DENSE


PLANS: dict[str, Callable[[float, Plan, float, float, int, Stairs], Plan]] = {
    "constant": _constant,
    "cosine": _cosine,
    "staircase": _staircase,
}
