"""`trilevel estimate ... --mtbf 3h`: simulate a run under faults; goodput by cause, and the checkpoint interval with the highest goodput.

Faults come at random: exponential times, `mtbf` on average, for the whole job. A fault ends every rank; `restart` seconds later the
launcher has noticed it, waited, checked the nodes and started the processes again, and they resume from the newest complete checkpoint
(`launch --restarts`). A checkpoint blocks training for `blocking` seconds and is complete `write` seconds after it began, in the
background. These seconds come from the journals of real runs, see `fault_costs`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from random import Random
from statistics import mean, quantiles
from typing import Any

from rich.table import Table

from trainer.config.errors import ConfigError
from trainer.config.values import Duration
from trainer.preflight.fault_costs import FaultCosts

CAUSES: tuple[str, ...] = ("training", "save", "start", "repeated", "detection", "restart")
RUNS = 40  # simulated runs per row
MOST_FAULTS = 100_000  # of one simulated run, after which it counts as one that does not end
MOST_IN_VAIN = 5_000  # faults without a new checkpoint in between, after which too
_MTBF = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(s|min|h|d)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_mtbf(text: str) -> float:
    """Seconds of e.g. `3h`, `10min`, `90s` or `2d`. Raises ConfigError."""
    found = _MTBF.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"--mtbf {text}: mean time between two faults of the job; write it as 3h, 10min, 90s or 2d")
    return float(found[1]) * _SECONDS[found[2]]


def simulate(work: float, interval: float, mtbf: float, costs: FaultCosts, seed: int) -> dict[str, float]:
    """Seconds by cause (CAUSES) of one run.

    work: seconds of training without faults. interval: seconds of training between checkpoints. mtbf: mean seconds between faults.
    seed: of the moments of the faults, which are the same for every `interval`. All values are infinite for a run that does not end.
    """
    draw, left, in_vain = Random(seed), work, 0
    spent = dict.fromkeys(CAUSES, 0.0)
    period = interval + costs.blocking
    for _ in range(MOST_FAULTS):
        until = draw.expovariate(1 / mtbf)
        saves = math.ceil(left / interval)
        if until >= costs.start + left + saves * costs.blocking:
            spent["start"] += costs.start
            spent["training"] += left
            spent["save"] += saves * costs.blocking
            return spent
        trained = until - costs.start
        # the newest checkpoint that was complete when the fault came
        done = max(0, min(saves - 1, math.floor((trained - (costs.write - costs.blocking)) / period)))
        spent["start"] += min(until, costs.start)
        spent["training"] += done * interval
        spent["save"] += done * costs.blocking
        spent["repeated"] += max(0.0, trained - done * period)
        spent["detection"] += costs.detection
        spent["restart"] += costs.restart
        left -= done * interval
        in_vain = 0 if done else in_vain + 1
        if in_vain == MOST_IN_VAIN:
            break
    return dict.fromkeys(CAUSES, math.inf)


@dataclass(frozen=True)
class Goodput:
    """Of simulated runs under one rate of faults. goodput: share of the wall time that is training which survives, mean; low, high: 5 and
    95 % of the runs. shares: of the wall time by cause. interval: seconds of training between checkpoints."""

    mtbf: float
    interval: float
    goodput: float
    low: float
    high: float
    hours: float
    shares: dict[str, float]


def goodput(work: float, interval: float, mtbf: float, costs: FaultCosts, runs: int = RUNS) -> Goodput:
    """Simulate `runs` runs. A run that does not end has goodput 0 and infinite hours."""
    found: list[dict[str, float]] = []
    for seed in range(runs):
        found.append(simulate(work, interval, mtbf, costs, seed))
        if math.isinf(found[-1]["training"]):
            return Goodput(mtbf, interval, 0.0, 0.0, 0.0, math.inf, dict.fromkeys(CAUSES, math.nan))
    walls = [sum(spent.values()) for spent in found]
    each = [work / wall for wall in walls]
    edges = quantiles(each, n=20, method="inclusive") if runs > 1 else [each[0]] * 2
    shares = {cause: sum(spent[cause] for spent in found) / sum(walls) for cause in CAUSES}
    return Goodput(mtbf, interval, mean(each), edges[0], edges[-1], mean(walls) / 3600, shares)


def youngs_interval(mtbf: float, blocking: float) -> float:
    """First-order optimum sqrt(2 x blocking x mtbf) of Young (1974), in seconds."""
    return math.sqrt(2 * blocking * mtbf)


def best_interval(work: float, mtbf: float, costs: FaultCosts, step: float) -> Goodput:
    """The interval with the highest mean goodput among powers of sqrt(2) times Young's. step: seconds of a step, the shortest interval."""
    middle = max(step, youngs_interval(mtbf, max(costs.blocking, 1e-3)))
    tried = sorted({min(work, max(step, middle * 2 ** (power / 2))) for power in range(-8, 9)})
    return max((goodput(work, interval, mtbf, costs) for interval in tried), key=lambda found: found.goodput)


@dataclass(frozen=True)
class FaultForecast:
    """Per rate of faults: goodput at the configured interval, at it where every fault is a hang, and at the best interval."""

    costs: FaultCosts
    timeout: float
    step: float
    rows: tuple[tuple[Goodput, Goodput | None, Goodput], ...]

    def facts(self) -> list[dict[str, Any]]:
        return [
            {
                "mtbf_seconds": now.mtbf, "interval_seconds": now.interval, "goodput": now.goodput, "goodput_5": now.low,
                "goodput_95": now.high, "hours": now.hours, "shares": now.shares, "goodput_hangs": hang.goodput if hang else None,
                "restart_seconds": self.costs.restart, "best_interval_steps": max(1, round(best.interval / self.step)),
                "best_goodput": best.goodput,
            }
            for now, hang, best in self.rows
        ]  # fmt: skip

    def table(self) -> Table:
        table = Table(title="under faults: simulated and not measured", title_justify="left")
        for name in (
            "a fault every",
            "checkpoint.every",
            "goodput",
            "5 to 95 % of runs",
            "hours",
            "save",
            "start",
            "restart",
            "repeated",
        ):
            table.add_column(name, justify="right")
        table.add_column("if all hang", justify="right")
        table.add_column("best checkpoint.every", justify="right")
        for now, hang, best in self.rows:
            steps = max(1, round(best.interval / self.step))
            table.add_row(
                _time(now.mtbf), f"{max(1, round(now.interval / self.step)):,}step", f"{now.goodput:.1%}",
                f"{now.low:.1%} to {now.high:.1%}", f"{now.hours:.4g}",
                *(f"{now.shares[name]:.1%}" for name in ("save", "start", "restart", "repeated")),
                f"{hang.goodput:.1%}" if hang else "", f"{steps}step: {best.goodput:.1%}",
            )  # fmt: skip
        return table

    def text(self) -> str:
        costs = self.costs
        hang = f"'if all hang': each fault is noticed engine.timeout={self.timeout:g} s later" if self.timeout else (
            "engine.timeout=0: a rank that hangs is waited for without limit and not simulated"
        )  # fmt: skip
        return (
            f"note: per attempt {costs.start:.3g} s from the start of the processes to the end of the first step; per checkpoint: "
            f"{costs.blocking:.3g} s blocked, complete after {costs.write:.3g} s\n"
            f"note: per fault {costs.restart:.3g} s until the next processes start ({costs.source}): all ranks end, the launcher "
            "waits 10 s and checks the nodes\n"
            "note: where measured, on the ranks of that run; more ranks start more slowly: set --start-seconds, --restart-seconds and "
            "--save-seconds to what a job of this size took\n"
            f"note: {RUNS} simulated runs per row, exponential times between faults, every fault restarts all ranks; {hang}"
        )


def forecast(
    hours: float, steps: int, epochs: int, every: Duration, timeout: float, mtbf: list[float], costs: FaultCosts
) -> FaultForecast:
    """Simulate the run under each rate of faults in `mtbf`, seconds.

    hours, steps: of training without faults, from `estimate`. every: `checkpoint.every`; 0 saves at the end only. timeout:
    `engine.timeout`.
    """
    work = hours * 3600
    step = work / max(1, steps)
    interval = work if every.count == 0 else every.count * (step if every.unit == "step" else work / epochs)
    interval = min(work, max(step, interval))
    hang = replace(costs, detection=timeout)
    rows = tuple(
        (
            goodput(work, interval, rate, costs),
            goodput(work, interval, rate, hang) if timeout else None,
            best_interval(work, rate, costs, step),
        )
        for rate in mtbf
    )
    return FaultForecast(costs, timeout, step, rows)


def _time(seconds: float) -> str:
    for name in ("d", "h", "min"):
        if seconds >= _SECONDS[name]:
            return f"{seconds / _SECONDS[name]:g} {name}"
    return f"{seconds:g} s"
