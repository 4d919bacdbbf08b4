"""Compare runs: differences to a base, over the whole run and at equal accuracy, and why two runs are not comparable.

Reads journals (run directories, or the journals in MLflow). Runs that differ only in their seed are one group: mean +- sd, and
differences to the base paired by seed, with 95 % intervals of Student's t (ratios in logarithms). The score of a run is its last
top-1, of the EMA if it has one.

There are two speedups, because each alone misleads: of the whole run (final scores differ), and at equal top-1, the highest that
both reached (a schedule made for a shorter run is ahead early).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.analysis.comparison.comparability import IGNORED_SETTINGS, caveats, fingerprint
from trainer.analysis.comparison.statistics import EQUAL, MeanInterval
from trainer.analysis.history import History, Point, history
from trainer.config.credentials import credential_in
from trainer.config.errors import TrilevelError
from trainer.config.run_config import flat
from trainer.storage.text import listed

COSTS = {  # costs of a score: how to read them from a point
    "time": lambda point: point.elapsed,
    "device hours": lambda point: point.device_seconds / 3600,
    "multiply-adds": lambda point: point.multiply_adds,
    "images": lambda point: float(point.images),
}


class NothingToCompare(TrilevelError, ValueError):
    """Runs that can't be found or have no score; the message names them and the remedy."""


@dataclass(frozen=True)
class Difference:
    """A group compared with the base, paired by seed (`paired` pairs); without common seeds each with each, without intervals.

    top1: difference of the scores, in [-1, 1]. whole: {cost: base / ours} over the whole runs, above 1 is cheaper. All are nan if only one
    of the two is finished. equal: the same up to the score that both of a pair reached; at: these scores.
    """

    paired: int
    top1: MeanInterval
    whole: dict[str, MeanInterval]
    equal: dict[str, MeanInterval]
    at: MeanInterval


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, by seed: finished ones, or unfinished ones."""

    name: str
    runs: tuple[History, ...]
    against: Difference | None  # None for the base

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    def spread(self, value: Any) -> MeanInterval:
        return MeanInterval.of([value(run) for run in self.runs])


@dataclass(frozen=True)
class Comparison:
    base: Group
    groups: tuple[Group, ...]  # the base first, then as given
    wrong: tuple[str, ...] = ()  # why differences may be misleading, one sentence each


def compare(runs: Sequence[Path | str], base: str | None = None, missing: Sequence[str] = ()) -> Comparison:
    """Compare run directories (at least one). `base`: the name of the reference run; default: the dense one if there is exactly one
    (not counting seeds), else the first; finished ones first. `missing`: names of runs without a journal, which become warnings.

    Raises JournalError for a directory without a journal, NothingToCompare without any score or for an unknown base.
    """
    read = [history(run) for run in dict.fromkeys(Path(run).resolve() for run in runs)]
    scored = [run for run in read if evaluations(run)]
    if not scored:
        names = listed(run.directory for run in read) or "no runs given"
        raise NothingToCompare(f"no evaluation in {names}: wait for the first evaluation of a run (evaluate.every)")
    groups: dict[tuple[str, int], list[History]] = {}
    for run in scored:  # a second run with the same settings and seed is a group of its own: something else must differ
        same = _sameness(run)
        turn = next(i for i in range(len(scored)) if seed(run) not in [seed(other) for other in groups.get((same, i), [])])
        groups.setdefault((same, turn), []).append(run)
    named = _named([sorted(members, key=seed) for members in groups.values()])
    if base is None:
        ended = [item for item in named if all(run.finished for run in item[1])] or named
        plain = [name for name, members in ended if all(dense(run) for run in members)]
        first = plain[0] if len(plain) == 1 else ended[0][0]
    else:
        first = next((n for n, members in named if base == n or base in [run.name for run in members]), None)
    if first is None:
        raise NothingToCompare(f"--base: unknown value {base!r}; valid values: {listed((run.name for run in scored), 20)}")
    ours = tuple(dict(named)[first])
    found = [Group(first, ours, None)]
    found += [Group(name, tuple(members), against(ours, tuple(members))) for name, members in named if name != first]
    left = [f"left out, without an evaluation: {run.directory}" for run in read if run not in scored]
    left += [f"left out, without a journal in MLflow: {name}; upload it with trilevel sync RUN" for name in missing]
    return Comparison(found[0], tuple(found), (*left, *caveats([run for group in found for run in group.runs])))


def dense(run: History) -> bool:
    """Whether the run kept every example, token, connection and weight."""
    everything = all((run.mean_share(kept) or 1.0) >= 1.0 for kept in ("examples", "tokens", "connections"))
    return everything and not run.of("weights")


def evaluations(run: History) -> list[Point]:
    """Evaluations that count for the run: of the EMA if there is one."""
    return run.evals(ema=True) or run.evals(ema=False)


def seed(run: History) -> int:
    return int(run.config.get("seed", 0))


def final(run: History) -> float:
    return float(evaluations(run)[-1]["top1"])


def cost_to_reach(run: History, top1: float, cost: str) -> float:
    """Cost until `top1` was first reached, interpolated linearly between evaluations; nan if never reached or the cost is unknown."""
    before: tuple[float, float] | None = None  # (cost, best so far)
    for point in evaluations(run):
        here = (COSTS[cost](point), float(point["top1"]))
        if here[1] >= top1:
            if before is None or here[1] == before[1]:
                return here[0]
            return before[0] + (here[0] - before[0]) * (top1 - before[1]) / (here[1] - before[1])
        before = (here[0], max(here[1], before[1]) if before else here[1])
    return math.nan


def against(base: tuple[History, ...], ours: tuple[History, ...]) -> Difference:
    """The runs of a group compared with those of the base."""
    seeds = {seed(run): run for run in base}
    pairs = [(seeds[seed(run)], run) for run in ours if seed(run) in seeds]
    paired = len(pairs)
    pairs = pairs or [(theirs, run) for theirs in base for run in ours]
    pairs = [(a, b) for a, b in pairs if _as_far(a, b)]
    tops = [min(max(float(p["top1"]) for p in evaluations(a)), max(float(p["top1"]) for p in evaluations(b))) for a, b in pairs]
    whole, equal = {}, {}
    for cost, read in COSTS.items():
        whole[cost] = MeanInterval.of_ratios([_ratio(read(a.last), read(b.last)) for a, b in pairs])
        both = zip(pairs, tops, strict=True)
        equal[cost] = MeanInterval.of_ratios(
            [_ratio(cost_to_reach(a, top, cost), cost_to_reach(b, top, cost)) for (a, b), top in both]
        )
    top1, at = MeanInterval.of([final(b) - final(a) for a, b in pairs]), MeanInterval.of(tops)
    if top1.sd < EQUAL:
        top1 = top1.alone()  # top-1 moves in steps of one image, so few seeds coincide by chance
    if not paired:  # each with each: the pairs are not independent, so no interval
        top1, at = top1.alone(), at.alone()
        whole, equal = ({cost: spread.alone() for cost, spread in of.items()} for of in (whole, equal))
    return Difference(paired, top1, whole, equal, at)


def from_mlflow(experiment: str, into: Path, uri: str | None = None) -> tuple[list[Path], list[str]]:
    """Journals of the runs of an experiment, and names of its runs without one. For each: the run directory if it is on this machine,
    else the journal in MLflow, downloaded under `into`.

    Raises NothingToCompare if MLflow does not answer, the experiment is unknown or has no run with a journal.
    """
    from trainer.tracking.address import address_of, from_environment
    from trainer.tracking.mlflow_client import hint, journals_of

    if uri and (wrong := credential_in(uri)):
        raise NothingToCompare(f"--uri {wrong}")
    given = address_of(uri) if uri else from_environment() or address_of(f"sqlite:///{Path('runs').resolve()}/mlflow.db")
    uri = given.uri
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.is_file():  # or MLflow would make an empty one there
        raise NothingToCompare(f"{file}: no such database; set --uri, or give run directories")
    try:
        found, missing = journals_of(given.opened, experiment, into)
    except LookupError as error:
        raise NothingToCompare(f"experiment {experiment!r}: not at {uri}; valid values: {error}") from error
    except Exception as error:
        text = given.redacted(" ".join(str(error).split()))[:300]
        raise NothingToCompare(f"{uri}: {type(error).__name__}: {text}{hint(error)}; or give run directories") from error
    if not found:
        raise NothingToCompare(f"experiment {experiment!r} at {uri}: no run with a journal; upload them with trilevel sync RUN")
    return found, missing


def _sameness(run: History) -> str:
    """A key that is equal for runs that differ only in their seed and in settings that affect neither results nor times."""
    config = {
        key: value for key, value in flat(run.config).items() if key not in IGNORED_SETTINGS and not key.startswith("tracking.")
    }
    known = [run.name] if not run.config else []
    data = [fingerprint(run.start, split) for split in ("train", "validation")]
    about = [data, *(run.start.get(name) for name in ("pixels", "world", "device")), run.finished]
    return json.dumps([known, config, about], sort_keys=True, default=str)


def _named(groups: list[list[History]]) -> list[tuple[str, list[History]]]:
    """Groups by the name of their first run, without the seed if the names differ; numbered if two would be the same."""
    named: dict[str, list[History]] = {}
    for members in groups:
        name = members[0].name
        if len({run.name for run in members}) > 1:
            name = re.sub(rf"[-_.]?(seed|s)?[-_.]?(?<!\d){seed(members[0])}$", "", name) or name
        if not members[0].finished:
            name += " (not finished)"
        named[name if name not in named else f"{name} ({len(named) + 1})"] = members
    return list(named.items())


def _as_far(a: History, b: History) -> bool:
    """Whether costs and scores at the end of two runs can be compared: both finished, or both stopped at the same epoch."""
    return (a.finished and b.finished) or (not a.finished and not b.finished and a.last.progress == b.last.progress)


def _ratio(base: float, ours: float) -> float:
    return base / ours if ours > 0 and base > 0 else math.nan
