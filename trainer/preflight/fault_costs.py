"""Seconds that a start, a restart and a checkpoint cost a run, from the journals of real runs: the input of `fault_simulation`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from trainer.analysis.report.goodput import gaps
from trainer.config.errors import ConfigError
from trainer.journal.reader import read

# s without a measured restart: 18 until all ranks have ended (median of 10, docs/results/faults.jsonl), 10 of launch.restarts.WAITS, 2 for
# the check of the nodes
RESTART = 30.0


@dataclass(frozen=True)
class FaultCosts:
    """Seconds. start: from the start of the processes to the end of the first step. blocking: a checkpoint stops training. write: from
    the beginning of a checkpoint until it is complete. detection: of a fault after which ranks hang, before `restart` begins. restart:
    from a fault to the start of the next processes; source: where it comes from."""

    start: float
    blocking: float
    write: float
    detection: float = 0.0
    restart: float = 0.0
    source: str = ""


def measured_costs(
    runs: Iterable[str | Path], start: float | None = None, save: float | None = None, restart: float | None = None
) -> FaultCosts:
    """Medians over the attempts and checkpoints of runs; of the attempts those that completed a step. Raises ConfigError where their
    journals have none; without a failed attempt that was followed by another one, `restart` is RESTART.

    start, save, restart: seconds that replace the measured ones; `save` blocks training until the checkpoint is complete.
    """
    starts: list[float] = []
    restarts: list[float] = []
    saves: list[tuple[float, float]] = []
    for run in runs:
        lines = list(read(run))
        saves += _saves(lines)
        restarts += [gap.seconds for gap in gaps(lines) if gap.failed and not gap.problem]
        reached = {line.get("attempt", 0): spent for line in lines if line["kind"] == "step" and (spent := line.get("spent"))}
        starts += [spent.get("start", 0.0) + spent["first_step"] for spent in reached.values() if "first_step" in spent]
    for name, value, found in (("start", start, starts), ("save", save, saves)):
        if value is None and not found:
            raise ConfigError(
                f"--mtbf: seconds of a {name} not measured; set --{name}-seconds, or add --from RUN, the directory of a short run with a "
                "checkpoint: trilevel train CONFIG name=short stop_at=200step"
            )
    for name, value in (("start", start), ("save", save), ("restart", restart)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"--{name}-seconds {value:g}: must be >= 0")
    source = f"median of {len(restarts)} in the journals, from the last line of a failed attempt"
    if restart is not None:
        source = "as given"
    elif not restarts:
        source = "not measured in the journals, so the default; set --restart-seconds"
    return FaultCosts(
        median(starts) if start is None else start,
        median(blocking for blocking, _ in saves) if save is None else save,
        median(complete for _, complete in saves) if save is None else save,
        restart=restart if restart is not None else median(restarts or [RESTART]),
        source=source,
    )


def _saves(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(seconds blocked, seconds until complete) of the checkpoints of a journal.

    A save in the background is complete `seconds` after training goes on. Without `checkpoint.asynchronous`, and at the end of an
    attempt, training waits for it, and `blocking` includes `seconds`; those at the end count only where the run has no other.
    """
    background = {
        line.get("attempt", 0): bool(((line.get("config") or {}).get("checkpoint") or {}).get("asynchronous", True))
        for line in lines
        if line["kind"] == "start"
    }
    ended = {line.get("attempt", 0) for line in lines if line["kind"] == "end"}
    saved = [line for line in lines if line["kind"] == "checkpoint" and "blocking" in line]
    last = {line.get("attempt", 0): place for place, line in enumerate(saved)}
    found: list[tuple[float, float]] = []
    at_the_end: list[tuple[float, float]] = []
    for place, line in enumerate(saved):
        number, blocking, seconds = line.get("attempt", 0), float(line["blocking"]), float(line.get("seconds", 0.0))
        if not background.get(number, True):
            found.append((blocking, max(blocking, seconds)))
        elif number in ended and place == last[number] and blocking >= seconds:
            at_the_end.append((blocking, blocking))
        else:
            found.append((blocking, blocking + seconds))
    return found or at_the_end
