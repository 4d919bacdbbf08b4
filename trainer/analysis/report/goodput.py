"""Where the time of a run went, by cause; from the journal.

The sum is the time from the start of the first attempt to the last line, less the pauses: an attempt lasts from the start of its process
to its last line, and what passes between a failed or killed attempt and the next one is `restart`. Pauses after an attempt that stopped or
finished belong to a person or to the queue and are counted apart. Goodput is the share of `training` in this sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.analysis.units import duration
from trainer.journal.reader import cuts, read

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
    "restart": "from the end of a failed attempt to the start of the next one, with attempts that failed before their start line",
    "repeated": "steps after the newest checkpoint, done again by a later attempt",
    "lost": "attempts without any step that survives",
    "rest": "after the last log line, or of attempts that did not record it",
}
# lines that are written when the work of `seconds` is done
_TIMED = {"eval": "evaluation", "density": "evaluation", "probe": "probe", "control": "control"}
DAY = 86_400.0
LONGEST_RESTART = DAY  # s; a longer time after a failure is a clock that was set, or a run that a person continued later
LONGEST_PAUSE = 100 * DAY  # s; a longer one is a clock that was set


@dataclass(frozen=True)
class Gap:
    """Between two attempts, from the last line of one to the start of the next one's processes. failed: the first one failed or was
    killed, so this is time of a restart and not a pause. problem: why `seconds` is 0 and not the difference of the clocks, or ""."""

    before: int
    after: int
    seconds: float
    failed: bool
    problem: str = ""


@dataclass(frozen=True)
class TimeAccount:
    """seconds: by cause (keys of NAMES), empty for a journal that did not record causes. paused: seconds between attempts, outside the
    sum. notes: gaps that count as 0."""

    seconds: dict[str, float]
    paused: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of `training` in the sum; 0 before the first second."""
        return self.seconds.get("training", 0.0) / self.total if self.total > 0 else 0.0


@dataclass
class _Attempt:
    begin: float
    last: float
    started: bool = False  # whether it wrote its start line
    status: str = ""  # of its end line
    step: int = 0
    worked: bool = False  # whether it logged a step
    records: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)  # time, step, seconds by cause
    timed: list[tuple[int, int, str, float]] = field(default_factory=list)  # records before it, step, cause, seconds

    @property
    def life(self) -> float:
        return max(0.0, self.last - self.begin)


def time_account(lines: Iterable[dict[str, Any]]) -> TimeAccount:
    """Of the lines of a journal, killed attempts included."""
    lines = list(lines)
    attempts, resumed = _attempts(lines), cuts(lines)
    if not any(isinstance(line.get("spent"), dict) for line in lines):
        return TimeAccount({})
    seconds = dict.fromkeys(NAMES, 0.0)
    for number, found in attempts.items():
        if found.started:
            cut = min((step for later, step in resumed.items() if later > number), default=None)
            _add(seconds, found, cut, resumed.get(number, 0))
        else:
            seconds["restart"] += found.life
    between = list(_gaps(attempts))
    seconds["restart"] += sum(gap.seconds for gap in between if gap.failed)
    paused = sum(gap.seconds for gap in between if not gap.failed)
    return TimeAccount(seconds, paused, tuple(gap.problem for gap in between if gap.problem))


def gaps(lines: Iterable[dict[str, Any]]) -> list[Gap]:
    """The times between the attempts of a journal."""
    return list(_gaps(_attempts(lines)))


def before_attempt(directory: Path, attempt: int, now: float, living: float, step: int) -> tuple[float, float]:
    """Seconds of training that survive, and counted seconds, of all attempts before the one that runs, with the restart in between.

    now: time of the journal; living: seconds that this process lived until now; step: from which the attempt resumed.
    """
    where = {"attempt": attempt, "time": now}
    here = [
        {"kind": "start", "starting": living, **where},
        {"kind": "resume", "step": step, "spent": {"start": living}, **where},
    ]
    known = [line for line in read(directory) if line.get("attempt", 0) < attempt] if attempt else []
    found = time_account([*known, *here])
    return found.seconds["training"], max(0.0, found.total - living)


def _attempts(lines: Iterable[dict[str, Any]]) -> dict[int, _Attempt]:
    attempts: dict[int, _Attempt] = {}
    for line in lines:
        number, kind = line.get("attempt", 0), line["kind"]
        begin = line["time"] - line.get("starting", 0.0)
        found = attempts.setdefault(number, _Attempt(begin, line["time"]))
        if kind == "start":
            found.begin, found.started = min(found.begin, begin), True
        found.last = max(found.last, line["time"])
        if isinstance(line.get("step"), int):
            found.step = max(found.step, line["step"])
        found.worked |= kind == "step"
        found.status = str(line.get("status", "finished")) if kind == "end" else found.status
        spent = line.get("spent")
        # A failed attempt ends steps after its last step line, and the state of its end line is that of the line
        if isinstance(spent, dict) and not (kind == "end" and found.status == "failed"):
            found.records.append((line["time"], found.step, spent))
        at = line.get("step", found.step)
        if kind in _TIMED:
            found.timed.append((len(found.records), at, _TIMED[kind], _positive(line.get("seconds"))))
        elif kind == "checkpoint":
            found.timed.append((len(found.records), at, "save", _positive(line.get("blocking"))))
    return dict(sorted(attempts.items()))


def _gaps(attempts: dict[int, _Attempt]) -> Iterator[Gap]:
    numbers = list(attempts)
    for before, after in pairwise(numbers):
        failed = attempts[before].status not in ("finished", "stopped")
        seconds = attempts[after].begin - attempts[before].last
        between = f"between attempts {before} and {after}"
        if seconds < 0:
            problem = (
                f"-{duration(-seconds)} {between}: the clock was set or is another host's; counted as 0" if seconds < -1 else ""
            )
            yield Gap(before, after, 0.0, failed, problem)
        elif seconds > (LONGEST_RESTART if failed else LONGEST_PAUSE):
            yield Gap(
                before, after, 0.0, failed, f"{duration(seconds)} {between}: too long for a {_WHAT[failed]}; counted as 0"
            )
        else:
            yield Gap(before, after, seconds, failed)


_WHAT = {True: "restart (a clock that was set, or a person continued the run)", False: "pause (a clock that was set)"}


def _add(seconds: dict[str, float], found: _Attempt, cut: int | None, resumed: int) -> None:
    """Add an attempt. cut: the step from which a later attempt resumed; resumed: the step from which this one did."""
    if cut is not None and cut <= resumed:  # nothing of it survives
        seconds["lost"] += found.life
        return
    kept = [record for record in found.records if cut is None or record[1] <= cut]
    if not kept:
        seconds["rest" if found.worked else "lost"] += found.life
        return
    time, logged, spent = kept[-1]
    until = min(found.life, max(0.0, time - found.begin))
    known = {name: _positive(value) for name, value in spent.items() if name in NAMES and name != "training"}
    scale = min(1.0, until / max(sum(known.values()), 1e-9))
    for name, value in known.items():
        seconds[name] += value * scale
    seconds["training"] += until - sum(known.values()) * scale
    left = found.life - until
    for records, step, cause, value in found.timed:
        # A save blocks after the step line of its step, its own line comes later, when it is on disk
        after = step >= logged if cause == "save" else records >= len(kept)
        if after and (cut is None or step <= cut):
            seconds[cause] += min(left, value)
            left -= min(left, value)
    seconds["rest" if cut is None else "repeated"] += left


def _positive(value: Any) -> float:
    return max(0.0, float(value)) if isinstance(value, int | float) and value == value else 0.0
