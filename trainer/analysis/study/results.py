"""A study from the kept journals of its runs: a row per arm, a paired test per question, and what the page must add about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.analysis.comparison.comparability import IGNORED_SETTINGS, caveats
from trainer.analysis.comparison.groups import evaluations, final, seed
from trainer.analysis.comparison.statistics import MeanInterval, PairedTest, holm
from trainer.analysis.history import History, Point, history, stored_bytes
from trainer.analysis.study import step_times
from trainer.analysis.study.file import StudyFile
from trainer.analysis.study.step_times import Cost, StepTimes
from trainer.config.errors import ConfigError
from trainer.config.load import load, parse_recorded
from trainer.config.run_config import flat

Runs = dict[str, dict[int, History]]  # of an arm, by seed
Costs = dict[str, dict[int, Cost]]  # training time of each run


@dataclass(frozen=True)
class Arm:
    """The runs of an arm by seed. multiply_adds, time: over the whole run, relative to the reference, paired by seed; time: see
    `StudyResult`. stored, stored_share: bytes of all weights, see `stored_bytes`, and relative to the reference; nan in a study where all
    runs have the same."""

    name: str
    runs: dict[int, History]
    top1: MeanInterval
    worst_class: MeanInterval  # nan where the journals lack it
    class_kept: (
        tuple[float, float] | None
    )  # share of its examples that a class keeps in the last epoch: lowest, highest of all runs
    images: float
    multiply_adds: MeanInterval
    time: MeanInterval
    stored: float = math.nan
    stored_share: float = math.nan


@dataclass(frozen=True)
class Question:
    """An arm compared with another on the seeds that both have. worst_class: difference of the accuracies of the worst classes. equal:
    top-1 difference where both have used as much as the smaller total of the two, read from their curves. later: asked after results were
    known, not corrected."""

    arm: str
    reference: str
    test: PairedTest
    worst_class: MeanInterval
    equal_multiply_adds: MeanInterval
    equal_time: MeanInterval
    later: bool = False


@dataclass(frozen=True)
class StudyResult:
    """times: step times measured with nothing beside, which `Arm.time` and `Question.equal_time` are then calculated from; without them
    they are those of the runs, which count only in a quiet study."""

    file: StudyFile
    arms: list[Arm]  # those with runs, in the order of the file
    questions: list[Question]
    notes: list[str]  # why numbers may mislead, one sentence each
    times: StepTimes | None = None

    @property
    def timed(self) -> bool:
        return self.file.quiet or self.times is not None

    def time(self, arm: str, run: History) -> Cost:
        """Training time of a run of `arm` at a point; nan everywhere if the arm was not measured."""
        return _time(self.times, self.file, arm, run)


def result(file: StudyFile, journals: Path) -> StudyResult:
    """From JOURNALS/STUDY/ARM-seedN.jsonl.xz. Raises JournalError for a damaged one."""
    runs = {arm: _runs(journals / file.name, arm) for arm in file.arms}
    for view, (arm, density) in file.views.items():
        seen = {number: run.at_density(density) for number, run in runs[arm].items()}
        runs[view] = {number: run for number, run in seen.items() if evaluations(run)}
    measured = step_times.read(journals / file.name)
    times = measured and measured.of(file)
    costs = {arm: {number: _time(times, file, arm, run) for number, run in of.items()} for arm, of in runs.items()}
    arms = [_arm(name, runs, costs, file.reference) for name, of in runs.items() if of]
    stored = {arm.name: MeanInterval.of([stored_bytes(run) for run in arm.runs.values()]).mean for arm in arms}
    if len({size for size in stored.values() if not math.isnan(size)}) > 1:
        whole = stored.get(file.reference, math.nan)
        arms = [replace(arm, stored=stored[arm.name], stored_share=_ratio(stored[arm.name], whole)) for arm in arms]
    asked = [_question(arm, other, runs, costs) for arm, other in file.questions]
    corrected = holm([one.test.p for one in asked])
    questions = [replace(one, test=replace(one.test, holm=p)) for one, p in zip(asked, corrected, strict=True)]
    questions += [replace(_question(arm, other, runs, costs), later=True) for arm, other in file.later]
    histories = [run for arm in file.arms for run in runs[arm].values()]
    notes = caveats(histories) if histories else []
    return StudyResult(file, arms, questions, [*notes, *_deviations(file, runs), *_untimed(file, runs, times)], times)


def top1_at(run: History, cost: Cost, at: float) -> float:
    """Top-1 when the run had used `at`, interpolated linearly between evaluations; nan before the first or behind the last one."""
    before: tuple[float, float] | None = None
    for point in evaluations(run):
        here = (cost(point), float(point["top1"]))
        if here[0] >= at:
            if before is None:
                return here[1] if math.isclose(here[0], at) else math.nan
            return before[1] + (here[1] - before[1]) * (at - before[0]) / (here[0] - before[0])
        before = here
    return before[1] if before and math.isclose(before[0], at) else math.nan


def _runs(folder: Path, arm: str) -> dict[int, History]:
    found = [history(path) for path in sorted(folder.glob(f"{arm}-seed*.jsonl.xz"))]
    return {seed(run): run for run in sorted(found, key=seed) if evaluations(run)}


def _time(times: StepTimes | None, file: StudyFile, arm: str, run: History) -> Cost:
    if times is None:
        return lambda point: point.trained
    name, _ = file.views.get(arm, (arm, 1.0))
    return times.cost(name, run) or (lambda point: math.nan)


def _arm(name: str, runs: Runs, costs: Costs, reference: str) -> Arm:
    own, of = runs[name], list(runs[name].values())
    worst = [_worst_class(run) for run in of]
    kept = [point["facts"] for run in of for point in run.of("epoch")[-1:] if "class_keep_min" in point.get("facts", {})]
    shares = (min(f["class_keep_min"] for f in kept), max(f["class_keep_max"] for f in kept)) if kept else None
    pairs = [(run, runs[reference][number]) for number, run in own.items() if number in runs[reference]]
    times = [
        _ratio(costs[name][number](run.last), costs[reference][number](runs[reference][number].last))
        for number, run in own.items() if number in runs[reference]
    ]  # fmt: skip
    return Arm(
        name, own, MeanInterval.of([final(run) for run in of]), MeanInterval.of(worst), shares,
        MeanInterval.of([float(run.last.images) for run in of]).mean,
        MeanInterval.of([_ratio(run.last.multiply_adds, other.last.multiply_adds) for run, other in pairs]),
        MeanInterval.of(times),
    )  # fmt: skip


def _worst_class(run: History) -> float:
    return evaluations(run)[-1].get("worst_class", math.nan)


def _question(arm: str, other: str, runs: Runs, costs: Costs) -> Question:
    both = [number for number in runs[arm] if number in runs[other]]
    pairs = [(runs[arm][number], runs[other][number]) for number in both]
    return Question(
        arm, other, PairedTest.of([final(a) - final(b) for a, b in pairs]),
        MeanInterval.of([_worst_class(a) - _worst_class(b) for a, b in pairs]),
        MeanInterval.of([_at_equal(a, b, _multiply_adds, _multiply_adds) for a, b in pairs]),
        MeanInterval.of([_at_equal(a, b, costs[arm][number], costs[other][number]) for number, (a, b) in zip(both, pairs, strict=True)]),
    )  # fmt: skip


def _multiply_adds(point: Point) -> float:
    return point.multiply_adds


def _at_equal(a: History, b: History, cost_a: Cost, cost_b: Cost) -> float:
    at = min(cost_a(evaluations(a)[-1]), cost_b(evaluations(b)[-1]))
    return top1_at(a, cost_a, at) - top1_at(b, cost_b, at)


def _untimed(file: StudyFile, runs: Runs, times: StepTimes | None) -> list[str]:
    """Arms whose time is missing, although others have theirs."""
    missing = [arm for arm in file.arms if runs[arm] and times and arm not in times.arms]
    text = "not timed with the settings that the file has now; measure again with `trilevel bench study`"
    return [f"{', '.join(missing)}: {text}"] if missing else []


def _deviations(file: StudyFile, runs: dict[str, dict[int, History]]) -> list[str]:
    """Settings of kept runs that differ from what the study's file asks for now."""
    found: dict[tuple[str, str], list[int]] = {}
    for arm in file.arms:
        for number, run in runs[arm].items():
            if text := _deviation(file, arm, number, run):
                found.setdefault((arm, text), []).append(number)
    return [f"{arm}, seed {', '.join(map(str, numbers))}: {text}" for (arm, text), numbers in found.items()]


def _deviation(file: StudyFile, arm: str, seed: int, run: History) -> str:
    try:
        asked = _settings(load(file.config, [word.replace("{seed}", str(seed)) for word in file.arms[arm]]).resolved())
        ran = _settings(parse_recorded(run.config, run.name).resolved())
    except ConfigError as error:
        return f"settings cannot be compared with the study's file: {' '.join(str(error).split())}"
    differ = [f"{key}={ran.get(key)} (file: {asked.get(key)})" for key in asked | ran if asked.get(key) != ran.get(key)]
    return f"other settings than the study's file: {', '.join(differ)}" if differ else ""


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    found = {
        key: value for key, value in flat(config).items() if key not in IGNORED_SETTINGS and not key.startswith("tracking.")
    }
    found["optim.fused"] = bool(found.get("optim.fused"))  # null is false on the CPUs of the kept runs, whose default was false
    return found


def _ratio(ours: float, base: float) -> float:
    return ours / base if base > 0 else math.nan
