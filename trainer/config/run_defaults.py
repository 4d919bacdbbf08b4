"""Defaults that depend on the length of the run (`ByRun`): keys that a configuration does not give become shares of `epochs`.

The papers' numbers are for 300 epochs: a window of 30 never ends in a run of 8. They are explicit in the recipes. A stored
configuration has every key, so it keeps its values; `with_recorded` takes them where a run continues.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from sparsity.settings import EPOCHS, ByRun, Range, RunLength, Settings
from trainer.config.method_section import MethodSection
from trainer.config.strict_yaml import load_yaml
from trainer.config.values import Duration, parse_duration

OF_OPTIM = {"warmup": ByRun("epochs / 10, at most 5", lambda run, given: min(5.0, round(run.epochs / 10, 3)))}


def with_run_defaults(raw: Mapping[str, Any], sections: Mapping[str, type[MethodSection]]) -> dict[str, Any]:
    """Plain values of a configuration with the keys that depend on the run. Invalid values stay, for validation to refuse.

    sections: those with a method.
    """
    filled = dict(raw)
    length = _length(raw)
    if length is None:
        return filled
    for name, missing in _missing(raw, sections).items():
        section = dict(raw.get(name) or {})
        for key, (by_run, in_ep) in missing.items():
            value = by_run.value(length, _numbers(section))
            section[key] = Duration(count=value, unit="ep") if in_ep else value
        filled[name] = section
    return filled


def with_recorded(raw: Mapping[str, Any], sections: Mapping[str, type[MethodSection]]) -> dict[str, Any]:
    """Plain values of a configuration that continues the run in its directory: keys that depend on the run and are not given have
    the recorded values, so that a run of an earlier version, whose defaults were others, goes on with its own."""
    filled = dict(raw)
    try:
        recorded = load_yaml((Path(raw.get("runs") or "runs") / str(raw.get("name")) / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError):
        return filled  # what is wrong with the directory is reported where the run is opened
    for name, missing in _missing(raw, sections).items():
        before = recorded.get(name) if isinstance(recorded, dict) else None
        if isinstance(before, dict):
            filled[name] = dict(raw.get(name) or {}) | {key: before[key] for key in missing if key in before}
    return filled


def _missing(raw: Mapping[str, Any], sections: Mapping[str, type[MethodSection]]) -> dict[str, dict[str, tuple[ByRun, bool]]]:
    """{section: {key that is not given: (its rule, whether it is a duration)}}, in the order in which they depend on each other."""
    found: dict[str, dict[str, tuple[ByRun, bool]]] = {}
    optim = raw.get("optim", {})
    if isinstance(optim, Mapping):
        found["optim"] = {key: (by_run, True) for key, by_run in OF_OPTIM.items() if key not in optim}
    for name, section in sections.items():
        there = raw.get(name)
        if not isinstance(there, Mapping):
            continue
        for choice, kinds in section.choices().items():
            kind = kinds.get(str(there.get(choice, section.default_of(choice))))
            if kind is None:
                continue
            for field in fields(kind):
                if by_run_of(field) and field.name not in there:
                    found.setdefault(name, {})[field.name] = by_run_of(field), _in_epochs(kind, field)
    return {name: missing for name, missing in found.items() if missing}


def by_run_of(field: Field[Any]) -> Any:
    """The rule of a field of a settings dataclass; None for one whose default is the same in every run."""
    return field.metadata.get("by_run")


def _in_epochs(kind: type[Settings], field: Field[Any]) -> bool:
    marks = get_args(get_type_hints(kind, include_extras=True)[field.name])
    return any(isinstance(mark, Range) and mark.unit == EPOCHS for mark in marks)


def _length(raw: Mapping[str, Any]) -> RunLength | None:
    """The length of the run; None if it is invalid."""
    data = raw.get("data")
    found = RunLength(raw.get("epochs", 300), data.get("repeats", 1) if isinstance(data, Mapping) else 1)
    return found if all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in found) else None


def _numbers(section: Mapping[str, Any]) -> dict[str, float]:
    """The values of a section that are numbers, durations in epochs."""
    found = {}
    for key, value in section.items():
        with contextlib.suppress(ValueError, OverflowError):
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[key] = float(value)
            elif isinstance(value, str | Duration) and (length := parse_duration(value)).unit == "ep":
                found[key] = length.count
    return found
