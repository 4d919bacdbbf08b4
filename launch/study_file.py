"""Reads `configs/studies/NAME.yaml`: one question, its arms as settings that differ from a base recipe, and seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import yaml_file
from launch.job import LaunchError, near

REQUIRED = ("name", "question", "config", "reference", "arms")
KEYS = (*REQUIRED, "seeds", "settings", "views", "questions", "later", "quiet")
SEED = "{seed}"
OURS = ("name", "seed", "runs", "tracking.parent")  # settings that the study itself gives to every run


@dataclass(frozen=True)
class Study:
    """arms: {name: settings as `key=value`, those of all arms first}, in the file's order. questions: pairs (arm, reference), those
    of `later`, which were asked after results were known, last."""

    file: str
    name: str
    config: str
    reference: str
    seeds: tuple[int, ...]
    arms: dict[str, tuple[str, ...]]
    questions: tuple[tuple[str, str], ...]

    def settings(self, arm: str, seed: int) -> tuple[str, ...]:
        """Those of a run: `{seed}` in a value stands for its seed, e.g. in the path of the weights that it begins with."""
        return tuple(text.replace(SEED, str(seed)) for text in self.arms[arm])


def read(file: str) -> Study:
    """Raises LaunchError naming the file, the key, the value and the remedy."""
    raw = yaml_file.read("study", file, "configs/studies/levels.yaml")
    if not isinstance(raw, dict):
        raise LaunchError(f"study {file}: must be a mapping of keys to values, got {type(raw).__name__}")
    for key in raw:
        if key not in KEYS:
            raise LaunchError(f"study {file}: {key}: unknown key{near(str(key), KEYS)}")
    for key in REQUIRED:
        if not raw.get(key):
            raise LaunchError(f"study {file}: {key}: required key is missing; add it")
    name, config = str(raw["name"]), str(raw["config"])
    _plain(file, "name", name)
    if not Path(config).is_file():
        raise LaunchError(f"study {file}: config={config}: no such file; give its path from the folder of the repository")
    shared = _settings(file, "settings", raw.get("settings") or {})
    if not isinstance(raw["arms"], dict):
        raise LaunchError(f"study {file}: arms={raw['arms']!r}: must map names to settings, e.g. dense: {{epochs: 20}}")
    arms = {str(arm): (*shared, *_settings(file, f"arms.{arm}", given or {})) for arm, given in raw["arms"].items()}
    for arm in arms:
        _plain(file, "arms", arm)
    views = _views(file, raw.get("views") or {}, arms)
    reference = str(raw["reference"])
    known(f"study {file}: reference", [reference], arms)
    seeds = raw.get("seeds", [0])
    if not _distinct_seeds(seeds):
        raise LaunchError(f"study {file}: seeds={seeds!r}: must be distinct integers >= 0, e.g. [0, 1, 2]")
    asked = raw.get("questions")
    first = [[arm, reference] for arm in arms if arm != reference] if asked is None else asked
    questions = (*_pairs(file, "questions", first, arms, views), *_pairs(file, "later", raw.get("later") or [], arms, views))
    return Study(file, name, config, reference, tuple(seeds), arms, questions)


def known(where: str, names: Iterable[str], arms: Iterable[str]) -> None:
    """Raises LaunchError for a name that is not an arm, with the nearest one."""
    for name in names:
        if name not in arms:
            raise LaunchError(f"{where}={name}: unknown arm{near(name, list(arms))}")


def as_setting(value: Any) -> str:
    """A value as `key=value` takes it: YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_setting(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_setting, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z0-9_][\w./*-]*", value) and yaml_file.is_text(value) else json.dumps(value)
    return json.dumps(value)


def _settings(file: str, where: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, dict):
        raise LaunchError(f"study {file}: {where}={given!r}: must be a mapping of settings, e.g. {{epochs: 20}}")
    for key in given:
        if key in OURS:
            raise LaunchError(f"study {file}: {where}.{key}: set by the study itself; remove it")
    for key, value in given.items():
        try:
            as_setting(value)
        except RecursionError:
            raise LaunchError(f"study {file}: {where}.{key}: contains an alias of itself; write the values out") from None
    return tuple(f"{key}={as_setting(value)}" for key, value in given.items())


def _pairs(file: str, key: str, given: Any, arms: dict[str, Any], views: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for pair in given if isinstance(given, list) else [given]:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise LaunchError(f"study {file}: {key}: {pair!r}: must be two arms, e.g. [tri_level, dense]")
        known(f"study {file}: {key}", map(str, pair), [*arms, *views])
        found.append((str(pair[0]), str(pair[1])))
    return found


def _views(file: str, given: Any, arms: dict[str, Any]) -> dict[str, Any]:
    """Arms with their scores at one of their `evaluate.densities`: {name: [arm, density]}; nothing is trained for them."""
    if not isinstance(given, dict):
        raise LaunchError(f"study {file}: views={given!r}: must map names to [arm, density], e.g. half: [dense, 0.5]")
    for name, view in given.items():
        _plain(file, "views", str(name))
        if name in arms or not isinstance(view, list) or len(view) != 2 or not isinstance(view[1], int | float):
            raise LaunchError(f"study {file}: views.{name}={view!r}: must be [arm, density] under a name of its own")
        known(f"study {file}: views.{name}", [str(view[0])], arms)
    return given


def _distinct_seeds(seeds: Any) -> bool:
    return (
        isinstance(seeds, list)
        and bool(seeds)
        and all(type(s) is int and s >= 0 for s in seeds)
        and len({*seeds}) == len(seeds)
    )


def _plain(file: str, key: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.]*", name):
        raise LaunchError(f"study {file}: {key}={name}: must be letters, digits, `_` and `.`: run directories are named by it")
