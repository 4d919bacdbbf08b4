"""The numbers of a comparison: per group of runs, means over its seeds and differences to the base."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from trainer.analysis.comparison.groups import Comparison, Difference, Group, final, seed
from trainer.analysis.comparison.statistics import MeanInterval
from trainer.analysis.history import History, left_of_weights, stored_bytes

COST_KEYS = {"time": "time", "device_hours": "device hours", "multiply_adds": "multiply-adds", "images": "images"}
UNKNOWN = MeanInterval.of([])


def figures(comparison: Comparison) -> list[dict[str, MeanInterval]]:
    """Figures by name, one dict per group; nan where unknown.

    Shares, top1 and mfu in [0, 1]; mfu_tflops: what mfu is a share of, per device; seconds of training; weights_bytes: of the whole
    network as stored, see `stored_bytes`; whole_COST and equal_COST:
    base / run over the whole runs, and up to the top-1 that both of a pair reached (equal_top1).
    """
    rates = _rates([run for group in comparison.groups for run in group.runs])
    return [_of_group(group, rates) | _against(group.against) for group in comparison.groups]


def facts(comparison: Comparison) -> list[dict[str, Any]]:
    """`figures` flat, for JSON and data frames: NAME is a mean; NAME_sd, NAME_low and NAME_high where they are known, None if not."""
    found = []
    for group, numbers in zip(comparison.groups, figures(comparison), strict=True):
        row: dict[str, Any] = {
            "run": group.name,
            "base": group.against is None,
            "finished": group.finished,
            "seeds": [seed(run) for run in group.runs],
            "paired": 0 if group.against is None else group.against.paired,
        }
        for name, value in numbers.items():
            parts = {name: value.mean, f"{name}_sd": value.sd, f"{name}_low": value.low, f"{name}_high": value.high}
            row |= {key: None if math.isnan(number) else number for key, number in parts.items()}
        found.append(row)
    known = [key for key in found[0] if any(row[key] is not None for row in found)]
    return [{key: row[key] for key in known} for row in found]


def _of_group(group: Group, rates: dict[str, float]) -> dict[str, MeanInterval]:
    of_run: dict[str, Callable[[History], float]] = {
        "top1": final,
        "images_per_second": lambda run: run.images_per_second,
        "mfu": lambda run: _mfu(run, rates),
        "mfu_tflops": lambda run: rates[_kind(run)] or math.nan,
        "memory_peak_mib": lambda run: _highest(run, "memory_peak_mib"),
        "energy_kwh": lambda run: _highest(run, "energy_kwh"),
        "seconds": lambda run: run.last.elapsed,
        "device_hours": lambda run: run.last.device_seconds / 3600,
    }
    found = {name: group.spread(read) for name, read in of_run.items()}
    found["multiply_adds"] = group.spread(lambda run: run.last.multiply_adds or math.nan).alone()
    for kept in ("examples", "tokens", "connections"):
        shares = [share for run in group.runs if (share := run.mean_share(kept)) is not None]
        found[f"kept_{kept}"] = MeanInterval.of(shares).alone()
    found["kept_weights"] = group.spread(lambda run: left_of_weights(run, "kept")).alone()
    found["weights_bytes"] = group.spread(stored_bytes).alone()
    return found


def _against(difference: Difference | None) -> dict[str, MeanInterval]:
    found = {"top1_difference": difference.top1 if difference else UNKNOWN}
    for key, cost in COST_KEYS.items():
        found[f"whole_{key}"] = difference.whole[cost] if difference else UNKNOWN
    found["equal_top1"] = difference.at if difference else UNKNOWN
    for key, cost in COST_KEYS.items():
        found[f"equal_{key}"] = difference.equal[cost] if difference else UNKNOWN
    return found


def _rates(runs: list[History]) -> dict[str, float]:
    """{kind of device and precision: the highest rate in matrix products of these runs, TFLOP/s of a device}: one denominator of MFU."""
    found: dict[str, float] = {}
    for run in runs:
        found[_kind(run)] = max(found.get(_kind(run), 0.0), run.matrix_tflops or 0.0)
    return found


def _kind(run: History) -> str:
    return str([run.start.get("device"), (run.config.get("engine") or {}).get("precision"), run.start.get("hosts")])


def _mfu(run: History, rates: dict[str, float]) -> float:
    found = run.mfu(rates[_kind(run)] or None)
    return math.nan if found is None else found


def _highest(run: History, name: str) -> float:
    return max((float(point[name]) for point in run.of("step") if point.get(name) is not None), default=math.nan)
