"""`python -m launch sweep`: configurations x settings x seeds, one run each; finished runs are skipped, the others continue.

Names are unique and stay the same from start to start, so that the same command restarts a sweep. In MLflow the
runs are children of one parent run, named like the sweep (`tracking.parent`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from launch import yaml_file
from launch.job import Job, LaunchError
from launch.kept_journals import lines


@dataclass(frozen=True)
class Point:
    """One run of a sweep and where it stands: "new", "finished", or how its last attempt ended ("stopped", "failed", "cut off")."""

    job: Job
    name: str
    directory: Path
    state: str = "new"
    top1: float | None = None

    @property
    def finished(self) -> bool:
        return self.state == "finished"


def points(configs: list[str], overrides: list[str], sets: list[str], seeds: str, name: str) -> list[Point]:
    """Every run of the sweep, seeds innermost. Raises LaunchError for a grid that cannot be read, or two runs of one name."""
    numbers = seeds_of(seeds)
    axes = [_axis(text) for text in sets]
    keys = [key for key, _ in axes]
    fixed = {text.partition("=")[0] for text in overrides}
    for key in ("name", "seed", "tracking.parent", *keys):
        if key in fixed:
            raise LaunchError(f"{key}=... is set by the sweep itself; remove it")
    for key in keys:
        if key in ("name", "seed", "tracking.parent", "runs") or keys.count(key) > 1:  # the last one would win silently
            raise LaunchError(
                f"--set {key}=...: give each setting once; use --seeds for seeds, --name for names, runs=DIRECTORY for the folder"
            )
    found = []
    for config in configs:
        stem, runs = about(config, overrides)
        for values in product(*[[(key, value) for value in values] for key, values in axes]):
            parts = [f"{key.rpartition('.')[2]}{value}" for key, value in values]
            for seed in numbers:
                run = re.sub(r"[^\w.-]+", "_", "-".join([name, stem, *parts, f"seed{seed}"]))
                given = [*overrides, *(f"{key}={value}" for key, value in values)]
                given += [f"name={run}", f"seed={seed}", f"tracking.parent={name}"]
                found.append(Point(Job(config, tuple(given), resume=True), run, runs / run))
    twice = {point.name for point in found if [other.name for other in found].count(point.name) > 1}
    if twice:
        raise LaunchError(f"{sorted(twice)[0]} would name two runs; give each configuration and value once")
    return found


def with_status(point: Point) -> Point:
    """The point with its state, read from its journal."""
    try:
        rows = list(lines(point.directory / "journal.jsonl"))
    except OSError:
        return point
    return status_of(point, rows)


def status_of(point: Point, rows: Iterable[dict[str, Any]]) -> Point:
    """The point with its state by the lines of a journal."""
    state, top1 = "cut off", None
    for line in rows:
        if line.get("kind") == "start":
            state = "cut off"
        elif line.get("kind") == "eval":
            top1 = line.get("top1") if isinstance(line.get("top1"), float | int) else top1
        elif line.get("kind") == "end":
            state = str(line.get("status"))
    return replace(point, state=state, top1=top1)


def unchanged(point: Point) -> bool:
    """Whether a run has the settings of its point as far as its config.yaml shows it: the configuration is not younger, and the settings of
    the command line have equal values. Else the trainer has to compare."""
    recorded = point.directory / "config.yaml"
    try:
        if Path(point.job.config).stat().st_mtime > recorded.stat().st_mtime:
            return False
        content = yaml_file.read("config", str(recorded), "configs/quickstart.yaml")
    except (OSError, LaunchError):
        return False
    for text in point.job.overrides:
        key, _, value = text.partition("=")
        found = content
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found != yaml_file.read_value(value):
            return False
    return True


def distinct_settings(found: list[Point]) -> list[Point]:
    """The first point of each configuration and setting: seeds need no check of their own."""

    def but_seed(point: Point) -> tuple[str, ...]:
        return (point.job.config, *(text for text in point.job.overrides if text.partition("=")[0] not in ("seed", "name")))

    return list({but_seed(point): point for point in reversed(found)}.values())[::-1]


def table(found: list[Point]) -> str:
    """The state of every run, and the command that compares them."""
    done = [str(point.directory) for point in found if point.finished]
    return "\n".join([states(found), *([f"compare: trilevel compare {shlex.join(done)}"] if done else [])])


def states(found: list[Point]) -> str:
    """The state and the newest top-1 of every run."""
    wide = max(len(point.name) for point in found)
    rows = [f"{'run':{wide}}  {'state':9}  top-1"]
    for point in found:
        rows.append(f"{point.name:{wide}}  {point.state:9}  {'' if point.top1 is None else f'{point.top1:.2%}'}".rstrip())
    return "\n".join(rows)


def seeds_of(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise LaunchError(f"--seeds {text}: must be distinct integers separated by commas, e.g. 0,1,2")
    return [int(word) for word in words]


def _axis(text: str) -> tuple[str, list[str]]:
    """ "optim.lr=1e-3,2e-3" -> the key and its values; commas inside brackets belong to a value."""
    key, equals, rest = text.partition("=")
    values, depth = [""], 0
    for letter in rest:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    if not equals or not key or not all(values) or len(set(values)) < len(values):
        raise LaunchError(f"--set {text}: must be a setting with distinct values, e.g. optim.lr=1e-3,2e-3")
    return key, values


def about(config: str, overrides: list[str]) -> tuple[str, Path]:
    """A configuration's name and the folder of its runs."""
    content = yaml_file.read("config", config, "configs/quickstart.yaml", texts=True)
    content = content if isinstance(content, dict) else {}
    given = [yaml_file.value_of(text.partition("=")[2]) for text in overrides if text.startswith("runs=")]
    return str(content.get("name") or Path(config).stem), Path(given[-1] if given else str(content.get("runs", "runs")))
