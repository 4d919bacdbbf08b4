"""A study from the kept journals of its runs: a row per arm, a paired test per question, and what the page must add about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.analysis.comparison.comparability import IGNORED_SETTINGS, caveats
from trainer.analysis.comparison.groups import evaluations, final, seed
from trainer.analysis.comparison.statistics import MeanInterval, PairedTest, holm
from trainer.analysis.history import History, Point, history, stored_bytes
from trainer.analysis.study.file import StudyFile
from trainer.config.errors import ConfigError
from trainer.config.load import load, parse_recorded
from trainer.config.run_config import flat


@dataclass(frozen=True)
class Arm:
    """The runs of an arm by seed. multiply_adds, time: over the whole run, relative to the reference, paired by seed. stored,
    stored_share: bytes of all weights, see `stored_bytes`, and relative to the reference; nan in a study where all runs have the same."""

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
    top-1 difference where both have used as much as the smaller total of the two, read from their curves."""

    arm: str
    reference: str
    test: PairedTest
    worst_class: MeanInterval
    equal_multiply_adds: MeanInterval
    equal_time: MeanInterval


@dataclass(frozen=True)
class StudyResult:
    file: StudyFile
    arms: list[Arm]  # those with runs, in the order of the file
    questions: list[Question]
    notes: list[str]  # why numbers may mislead, one sentence each


def result(file: StudyFile, journals: Path) -> StudyResult:
    """From JOURNALS/STUDY/ARM-seedN.jsonl.xz. Raises JournalError for a damaged one."""
    runs = {arm: _runs(journals / file.name, arm) for arm in file.arms}
    for view, (arm, density) in file.views.items():
        seen = {number: run.at_density(density) for number, run in runs[arm].items()}
        runs[view] = {number: run for number, run in seen.items() if evaluations(run)}
    base = runs[file.reference]
    arms = [_arm(name, of, base) for name, of in runs.items() if of]
    stored = {arm.name: MeanInterval.of([stored_bytes(run) for run in arm.runs.values()]).mean for arm in arms}
    if len({size for size in stored.values() if not math.isnan(size)}) > 1:
        whole = stored.get(file.reference, math.nan)
        arms = [replace(arm, stored=stored[arm.name], stored_share=_ratio(stored[arm.name], whole)) for arm in arms]
    asked = [_question(arm, other, runs[arm], runs[other]) for arm, other in file.questions]
    corrected = holm([one.test.p for one in asked])
    questions = [replace(one, test=replace(one.test, holm=p)) for one, p in zip(asked, corrected, strict=True)]
    histories = [run for arm in file.arms for run in runs[arm].values()]
    notes = caveats(histories) if histories else []
    return StudyResult(file, arms, questions, [*notes, *_deviations(file, runs)])


def top1_at(run: History, cost: Callable[[Point], float], at: float) -> float:
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


def _arm(name: str, runs: dict[int, History], base: dict[int, History]) -> Arm:
    of = list(runs.values())
    worst = [_worst_class(run) for run in of]
    kept = [point["facts"] for run in of for point in run.of("epoch")[-1:] if "class_keep_min" in point.get("facts", {})]
    shares = (min(f["class_keep_min"] for f in kept), max(f["class_keep_max"] for f in kept)) if kept else None
    pairs = [(run, base[number]) for number, run in runs.items() if number in base]
    return Arm(
        name, runs, MeanInterval.of([final(run) for run in of]), MeanInterval.of(worst), shares,
        MeanInterval.of([float(run.last.images) for run in of]).mean,
        MeanInterval.of([_ratio(run.last.multiply_adds, other.last.multiply_adds) for run, other in pairs]),
        MeanInterval.of([_ratio(run.last.trained, other.last.trained) for run, other in pairs]),
    )  # fmt: skip


def _worst_class(run: History) -> float:
    return evaluations(run)[-1].get("worst_class", math.nan)


def _question(arm: str, other: str, ours: dict[int, History], theirs: dict[int, History]) -> Question:
    pairs = [(ours[number], theirs[number]) for number in ours if number in theirs]
    return Question(
        arm, other, PairedTest.of([final(a) - final(b) for a, b in pairs]),
        MeanInterval.of([_worst_class(a) - _worst_class(b) for a, b in pairs]),
        MeanInterval.of([_at_equal(a, b, lambda point: point.multiply_adds) for a, b in pairs]),
        MeanInterval.of([_at_equal(a, b, lambda point: point.trained) for a, b in pairs]),
    )  # fmt: skip


def _at_equal(a: History, b: History, cost: Callable[[Point], float]) -> float:
    at = min(cost(evaluations(a)[-1]), cost(evaluations(b)[-1]))
    return top1_at(a, cost, at) - top1_at(b, cost, at)


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
