"""Training time of a study's runs, from the step times that `trilevel bench study` measured with nothing beside.

The unit is the time of an image in the reference's dense step. A run's images come from its journal; each counts as the ratio of its
plan's step time to the dense one. A probed image of `examples.rule: probe` counts a third of its plan's multiply-adds relative to dense:
a forward pass without a backward pass of twice its time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from trainer.analysis.history import History, Point
from trainer.analysis.study.file import StudyFile
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.config.run_config import Config

FILE = "step_times.json"
MEASURED = ("device", "precision", "threads", "torch", "date", "commit", "rounds")
COUNTS = ("threads", "rounds")
COMPUTED = ("model", "tokens", "connections", "engine", "compat")  # sections that change what a step computes
Cost = Callable[[Point], float]


@dataclass(frozen=True)
class StepTimes:
    """The file of a measurement. arms: {arm: [start, end (epochs), share of the steps, row]}; rows: {row: step time / dense}; measured:
    device, precision, threads, torch, date, commit, rounds; settings: {arm: `fingerprint` of what was measured}."""

    arms: dict[str, list[list[Any]]]
    rows: dict[str, float]
    measured: dict[str, Any]
    settings: dict[str, str]

    def of(self, file: StudyFile) -> StepTimes:
        """Without the arms whose settings in the study's file are others now."""
        same = {arm for arm in self.arms if arm in file.arms and self.settings.get(arm) == fingerprint(configured(file, arm))}
        return replace(self, arms={arm: stretches for arm, stretches in self.arms.items() if arm in same})

    def cost(self, arm: str, run: History) -> Cost | None:
        """Time that the run has trained at a point; None if the arm was not measured."""
        if arm not in self.arms:
            return None
        steps, times = [0.0], [0.0]
        for point, time in self._intervals(arm, run):
            steps.append(float(point.step))
            times.append(times[-1] + time)
        probes = [(point.step, _probed(point, run)) for point in run.of("probe")]
        return lambda point: float(np.interp(point.step, steps, times)) + sum(time for at, time in probes if at <= point.step)

    def _intervals(self, arm: str, run: History) -> Iterator[tuple[Point, float]]:
        """Each log line with the time of the images since the previous one."""
        images, progress = 0, 0.0
        for point in run.of("step"):
            yield point, (point.images - images) * self._mean(arm, progress, point.progress)
            images, progress = point.images, point.progress

    def _mean(self, arm: str, begin: float, end: float) -> float:
        """Ratio of the step times, mean over the steps between two points of the schedule."""
        parts = [(min(end, to) - max(begin, start), share, self.rows[row]) for start, to, share, row in self.arms[arm]]
        parts = [(max(0.0, length) * share, ratio) for length, share, ratio in parts]
        whole = sum(weight for weight, _ in parts)
        return sum(weight * ratio for weight, ratio in parts) / whole if whole > 0 else float("nan")


def configured(file: StudyFile, arm: str) -> Config:
    """The settings of an arm; of its seeds the first, on which no step time depends. Raises ConfigError."""
    return load(file.config, [word.replace("{seed}", "0") for word in file.arms[arm]])


def computed(config: Config) -> str:
    """What a step computes besides its plan: equal text, equal computation."""
    resolved = config.resolved()
    resolved["model"]["init"] = "random"
    return json.dumps({key: resolved[key] for key in COMPUTED}, sort_keys=True)


def fingerprint(config: Config) -> str:
    """Changes with everything that the times of an arm depend on: computation, schedule of keep ratios, batch, optimizer."""
    schedule = {"epochs": config.epochs, "plan": config.resolved()["plan"]}
    others = {"batch": config.data.batch, "micro_batch": config.data.micro_batch, "optimizer": config.optim.name}
    return sha256((computed(config) + json.dumps(schedule | others, sort_keys=True)).encode()).hexdigest()[:16]


def _probed(point: Point, run: History) -> float:
    return point.get("probed", 0) * point.get("multiply_adds", float("nan")) / run.start.get("multiply_adds", float("nan")) / 3


def read(folder: Path) -> StepTimes | None:
    """FOLDER/step_times.json; None if there is none. Raises ConfigError for a file that is not one of `trilevel bench study`."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text())
        arms, measured = raw.pop("arms"), raw.pop("measured")
        rows = {str(name): float(row["ratio"]) for name, row in raw.items()}
        if bad := [name for name, ratio in rows.items() if not 0 < ratio < float("inf")]:
            raise ValueError(f"row {bad[0]}: ratio={rows[bad[0]]}")
        for arm, stretches in arms.items():
            for start, end, share, row in stretches:
                if not (0 <= float(start) < float(end) and 0 < float(share) <= 1 and row in rows):
                    raise ValueError(f"arm {arm}: {[start, end, share, row]}")
        settings = {str(arm): str(measured["settings"][arm]) for arm in arms}
        return StepTimes(
            arms, rows, {key: measured[key] if key in COUNTS else str(measured[key]) for key in MEASURED}, settings
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a result of `trilevel bench study` ({error}); measure again with `--json {path}`, or remove it"
        ) from error
