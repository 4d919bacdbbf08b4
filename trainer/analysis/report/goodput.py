"""Where the time of all attempts of a run went, by cause; from the journal.

The sum is the wall time of all attempts, each from the start of its process to its last line. Time between attempts is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainer.journal.reader import cuts

# in the order of the report; the first eight are measured in the run, see `engine.place_clock`
NAMES = {
    "training": "steps whose weights survive",
    "start": "start of the processes to the first batch",
    "first_step": "the first step with compilation",
    "stall": "waiting for data",
    "evaluation": "evaluation",
    "save": "blocked by checkpoints",
    "probe": "probe of examples",
    "control": "dense baseline",
    "repeated": "steps after the newest checkpoint, done again by a later attempt",
    "lost": "attempts without any step that survives",
    "rest": "after the last log line, or of attempts that did not record it",
}


@dataclass
class _Attempt:
    begin: float
    last: float
    step: int = 0
    worked: bool = False  # whether it logged a step
    records: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)  # time, step, seconds by cause


def by_cause(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds by cause (keys of NAMES) over the lines of a journal, killed attempts included; {} for one that did not record them."""
    lines = list(lines)
    resumed = cuts(lines)
    attempts: dict[int, _Attempt] = {}
    for line in lines:
        number = line.get("attempt", 0)
        if line["kind"] == "start":
            attempts[number] = _Attempt(line["time"] - line.get("starting", 0.0), line["time"])
        if (found := attempts.get(number)) is None:  # it failed before its first line
            continue
        found.last = max(found.last, line["time"])
        if isinstance(line.get("step"), int):
            found.step = max(found.step, line["step"])
        found.worked |= line["kind"] == "step"
        if isinstance(spent := line.get("spent"), dict):
            found.records.append((line["time"], found.step, spent))
    if not any(found.records for found in attempts.values()):
        return {}
    seconds = dict.fromkeys(NAMES, 0.0)
    for number, found in attempts.items():
        _add(
            seconds,
            found,
            min((step for later, step in resumed.items() if later > number), default=None),
            resumed.get(number, 0),
        )
    return seconds


def _add(seconds: dict[str, float], found: _Attempt, cut: int | None, resumed: int) -> None:
    """Add an attempt. cut: the step from which a later attempt resumed; resumed: the step from which this one did."""
    wall = max(0.0, found.last - found.begin)
    if cut is not None and cut <= resumed:  # nothing of it survives
        seconds["lost"] += wall
        return
    kept = [record for record in found.records if cut is None or record[1] <= cut]
    if not kept:
        seconds["rest" if found.worked else "lost"] += wall
        return
    time, _, spent = kept[-1]
    until = max(0.0, time - found.begin)
    known = {name: value for name, value in spent.items() if name in NAMES and name != "training"}
    for name, value in known.items():
        seconds[name] += value
    seconds["training"] += until - sum(known.values())
    seconds["rest" if cut is None else "repeated"] += wall - until
