"""`python -m tests.preflight.goodput_page` prints docs/results/goodput.md: the simulation of `trilevel estimate --mtbf` for 1,024 ranks."""

from __future__ import annotations

import datetime
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from launch.restarts import WAITS
from trainer.preflight.fault_costs import FaultCosts
from trainer.preflight.fault_simulation import RUNS, Goodput, best_interval, goodput

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ROOT / "docs" / "results" / "faults.jsonl"
KIND = "rank 0 killed"  # the fault after which no rank writes a last line
RATES = {"3 h": 10_800.0, "10 min": 600.0}
HOURS, STEPS = 24, 300 * (1_281_167 // 2016)  # assumed; of configs/deit_small_in1k.yaml
TARGET, TIMEOUT = 0.95, 600.0  # TIMEOUT: the default of engine.timeout
WAIT = WAITS[0]  # after a first failure; more after failures from the same checkpoint
# `trilevel bench checkpoint configs/deit_small_in1k.yaml optim.ema=0.9999`
BLOCKING, WRITING = 0.236, 5.453
SAVED_AT = "2026-11-22, cf60ad1"
# assumed (start, restart) of a job of 1,024 ranks, which we could not measure
ASSUMED = ((120.0, 60.0), (300.0, 60.0), (300.0, 150.0), (600.0, 150.0))
INTERVALS = (15.0, 60.0, 300.0, 600.0, 1200.0, 3600.0)


class Measured(NamedTuple):
    """Medians over `count` faults, seconds: until all ranks had ended; from the start of the processes to the end of a step."""

    count: int
    end: float
    start: float
    about: str


def measured(file: Path = FAULTS) -> Measured:
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == KIND]
    faults = [fault for row in rows for fault in row["faults"] if None not in (fault["to_exit"], fault["to_step"])]
    about = "; ".join(sorted({f"{row['hardware']}, {row['date']}, {row['commit']}" for row in rows}))
    starts = [fault["to_step"] - fault["to_exit"] - WAIT for fault in faults]
    return Measured(len(faults), median(fault["to_exit"] for fault in faults), median(starts), about)


def page(file: Path = FAULTS, hours: float = HOURS) -> list[str]:
    """The lines of docs/results/goodput.md."""
    found = measured(file)
    work, step = hours * 3600, hours * 3600 / STEPS
    here = FaultCosts(found.start, BLOCKING, BLOCKING + WRITING, restart=found.end + WAIT)
    costs = [here, *(replace(here, start=start, restart=restart) for start, restart in ASSUMED)]
    best = {(name, cost): best_interval(work, rate, cost, step) for name, rate in RATES.items() for cost in costs}
    one = best["3 h", here]
    result = (
        f"With a fault every 3 h and the measured seconds the simulated goodput of DeiT-S is {one.goodput:.1%} at a checkpoint "
        f"every {one.interval:.0f} s of training, {_verdict(one)} the target of {TARGET:.0%}. The target is met as long as restart "
        f"and start take at most {_longest(work, here, step):.0f} s together. With a fault every 10 min the goodput is "
        f"{best['10 min', here].goodput:.1%} at a checkpoint every {best['10 min', here].interval:.0f} s."
    )
    return [
        "# Goodput of 1,024 ranks under faults: simulated",
        "",
        f"`python -m tests.preflight.goodput_page > docs/results/goodput.md`, {datetime.date.today()}, {_commit()}. Measured are only",
        "the inputs marked so; no job of that size was run by us. The simulation is that of",
        "`trilevel estimate CONFIG --nodes 128 --processes 8 --from step.json --from RUN --mtbf 3h --mtbf 10min`; the number of",
        "ranks enters only by the mean time between two faults of the whole job and the seconds below",
        "([launching](../launching.md#before-a-run)).",
        "",
        f"**Result.** {result}",
        "",
        *_inputs(found, here, hours),
        "",
        "## Best checkpoint interval",
        f"Means of {RUNS} simulated runs with exponential times between faults. 'If all hang': every fault is noticed only after",
        f"`engine.timeout` ({TIMEOUT:.0f} s), at the same interval. Steps: `checkpoint.every` of the assumed run.",
        "",
        "| a fault every | start, s | restart, s | best interval | goodput | 5 to 95 % of runs | save | start | restart | repeated "
        f"| >= {TARGET:.0%} | if all hang |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---|---:|",
        *(_row(name, cost, best[name, cost], work, step, cost == here) for name in RATES for cost in costs),
        "",
        "## How much the interval matters",
        f"Goodput with the measured seconds ({here.start:.0f} s start, {here.restart:.0f} s restart):",
        "",
        f"| a fault every | {' | '.join(_seconds(value) for value in INTERVALS)} |",
        "|---|" + "---:|" * len(INTERVALS),
        *(f"| {name} | {' | '.join(_at(work, value, rate, here) for value in INTERVALS)} |" for name, rate in RATES.items()),
        "",
        "Not in the simulation: evaluation, waits for data, faults that come in bursts, a node that stays away, a wait in a queue, a",
        "checkpoint that is written more slowly because many ranks read the same file system.",
    ]


def _inputs(found: Measured, here: FaultCosts, hours: float) -> list[str]:
    saves = "`trilevel bench checkpoint configs/deit_small_in1k.yaml optim.ema=0.9999`"
    rows = (
        (
            "from a fault to the start of the next processes (`--restart-seconds`)", f"{here.restart:.1f}",
            f"measured: {found.end:.1f} until all ranks had ended, median of {found.count} faults '{KIND}' "
            f"([faults.jsonl](faults.jsonl)), two ranks, {found.about}; and {WAIT:.0f} that `launch` waits",
        ),
        (
            "from there to the end of a step (`--start-seconds`): Python, process group, data, first step", f"{here.start:.1f}",
            "measured, the same faults; mostly imports, on a machine with other work, a network of .1 M parameters, not compiled",
        ),
        (
            "a save blocks training", str(BLOCKING),
            f"measured: DeiT-S, AdamW and average, 336.7 MiB: {saves}, median of 6, one process, two shared cores with other work, "
            f"{SAVED_AT}",
        ),
        ("writing it, in the background", str(WRITING), "measured, the same"),
        (
            "training without faults", f"{hours:g} h",
            f"assumed: {STEPS:,} steps (300 epochs of ImageNet-1k, batch 2,016) of {hours * 3600 / STEPS:.3f} s",
        ),
    )  # fmt: skip
    return [
        "## Inputs",
        "| seconds | value | where from |",
        "|---|---:|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Start and restart of 1,024 ranks were not measured: the other rows assume them (a shared file system and graphs to compile make",
        "a start longer; `launch hosts` allows 120 s for the check of the nodes).",
    ]


def _row(name: str, cost: FaultCosts, best: Goodput, work: float, step: float, here: bool) -> str:
    hang = goodput(work, best.interval, RATES[name], replace(cost, detection=TIMEOUT))
    cells = (
        name, f"{cost.start:.0f}{' (measured)' if here else ''}", f"{cost.restart:.0f}{' (measured)' if here else ''}",
        f"{best.interval:.0f} s, {max(1, round(best.interval / step)):,} steps", f"**{best.goodput:.1%}**",
        f"{best.low:.1%} to {best.high:.1%}", *(f"{best.shares[cause]:.1%}" for cause in ("save", "start", "restart", "repeated")),
        "yes" if best.goodput >= TARGET else "no", f"{hang.goodput:.1%}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _longest(work: float, cost: FaultCosts, step: float) -> float:
    """Seconds of start and restart together up to which the target is met at a fault per 3 h, to 10 s."""
    low, high = 0.0, RATES["3 h"]
    while high - low > 10:
        middle = (low + high) / 2
        found = best_interval(work, RATES["3 h"], replace(cost, start=middle / 2, restart=middle / 2), step)
        low, high = (middle, high) if found.goodput >= TARGET else (low, middle)
    return 10 * (low // 10)


def _verdict(found: Goodput) -> str:
    return "above" if found.goodput >= TARGET else "below"


def _at(work: float, interval: float, rate: float, cost: FaultCosts) -> str:
    found = goodput(work, interval, rate, cost)
    return f"{found.goodput:.1%}" if found.goodput else "does not end"


def _seconds(value: float) -> str:
    return f"{value:g} s" if value < 60 else f"{value / 60:g} min"


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    print("\n".join(page()))
