"""What the page of a study reads from `configs/studies/NAME.yaml`. The launcher checks these files in full before it starts runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.config.errors import ConfigError
from trainer.config.strict_yaml import load_yaml


@dataclass(frozen=True)
class StudyFile:
    """arms: {name: settings as `key=value`, those of all arms first}. questions: pairs (arm or view, reference). later: such pairs
    that were asked after results were known. quiet: times count.
    views: {name: (arm, density)}, an arm with its scores at one of its `evaluate.densities`."""

    path: Path
    name: str
    question: str
    config: str
    reference: str
    arms: dict[str, list[str]]
    questions: list[tuple[str, str]]
    quiet: bool
    views: dict[str, tuple[str, float]] = field(default_factory=dict)
    later: list[tuple[str, str]] = field(default_factory=list)


def read(path: Path | str) -> StudyFile:
    """Raises ConfigError naming the file, the key and the remedy."""
    path = Path(path)
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--study {path}: cannot be read ({error}); give a file such as configs/studies/levels.yaml"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--study {path}: not valid YAML: {error}") from error
    missing = [
        key for key in ("name", "question", "config", "reference", "arms") if not isinstance(raw, dict) or not raw.get(key)
    ]
    if missing:
        raise ConfigError(f"--study {path}: {missing[0]}: required key is missing; add it")
    if not isinstance(raw["arms"], dict):
        raise ConfigError(f"--study {path}: arms={raw['arms']!r}: must map names to settings, e.g. dense: {{epochs: 20}}")
    shared, reference = raw.get("settings") or {}, str(raw["reference"])
    arms = {str(arm): _words({**shared, **(given or {})}) for arm, given in raw["arms"].items()}
    views = {str(view): (str(arm), float(density)) for view, (arm, density) in (raw.get("views") or {}).items()}
    given = raw.get("questions")
    pairs = [[arm, reference] for arm in arms if arm != reference] if given is None else given
    later = raw.get("later") or []
    for pair in [[reference, reference], *pairs, *later]:
        for arm in pair if isinstance(pair, list) and len(pair) == 2 else [pair]:
            if arm not in arms and arm not in views:
                raise ConfigError(f"--study {path}: {arm!r}: unknown arm; valid values: {', '.join([*arms, *views])}")
    questions = [(str(arm), str(other)) for arm, other in pairs]
    return StudyFile(
        path,
        str(raw["name"]),
        str(raw["question"]),
        str(raw["config"]),
        reference,
        arms,
        questions,
        raw.get("quiet") is True,
        views,
        [(str(arm), str(other)) for arm, other in later],
    )


def _words(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
