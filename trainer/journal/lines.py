"""What the readers of a journal rely on: the types of its fields. A line that has another type is no line of ours, or was damaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

_LARGEST = 2**53  # counts and times above are damage; floats hold integers up to it
_Check = tuple[Callable[[Any], bool], str]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 1e300


def _finite(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


COUNT: _Check = _count, "an integer from 0 to 2^53"
NUMBER: _Check = _number, "a number"
MAYBE: _Check = lambda value: value is None or _number(value), "a number or null"
LOSS: _Check = lambda value: isinstance(value, int | float), "a number"  # may be infinite
TIME: _Check = lambda value: _number(value) and abs(value) < 1e11, "seconds since 1970"
TEXT: _Check = lambda value: isinstance(value, str), "a text"
LIST: _Check = lambda value: isinstance(value, list), "a list"
TEXTS: _Check = lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of texts"
FINITE: _Check = _finite, "a finite number"
SPENT: _Check = lambda value: isinstance(value, dict) and all(map(_finite, value.values())), "{cause: seconds}"
CONFIG: _Check = (
    lambda value: (
        isinstance(value, dict)
        and isinstance(tracking := value.get("tracking") or {}, dict)
        and isinstance(tracking.get("tags") or {}, dict)
    ),
    "an object, with objects in tracking and tracking.tags",
)
TABLE: _Check = lambda value: isinstance(value, dict), "an object"
MAYBE_TABLE: _Check = lambda value: value is None or isinstance(value, dict), "an object or null"
TOKENS: _Check = lambda value: _numbers(value) and (not value or max(value) > 0), "a list of numbers above 0"
PHASES: _Check = (
    lambda value: isinstance(value, dict) and all(isinstance(p, dict) and _number(p.get("median")) for p in value.values()),
    "{phase: {median, ...}}",
)
WORLD: _Check = lambda value: _count(value) and value > 0, "an integer above 0"

EVERY: dict[str, _Check] = {"time": TIME, "attempt": COUNT}
_WHERE: dict[str, _Check] = {"step": COUNT, "epoch": COUNT, "batch": COUNT, "progress": NUMBER}
_KEPT: dict[str, _Check] = {"keep_tokens": NUMBER, "keep_connections": NUMBER}
FIELDS: Mapping[str, Mapping[str, _Check]] = {
    "start": {
        "config": CONFIG, "world": WORLD, "versions": MAYBE_TABLE, "data": MAYBE_TABLE, "classes": LIST, "hosts": LIST, "pixels": LIST,
        "multiply_adds": NUMBER, "matrix_tflops": MAYBE, "starting": NUMBER, "teacher_hash": TEXT, "teacher_parameters": NUMBER,
        "teacher_memory_mib": NUMBER, "teacher_multiply_adds": NUMBER, "warnings": TEXTS, "importance": TEXT,
    },
    "resume": _WHERE,
    "epoch": _WHERE | {"kept": COUNT, "examples": COUNT, "steps": COUNT, "facts": TABLE},
    "plateau": _WHERE | _KEPT | {"tokens": TOKENS, "multiply_adds": NUMBER},
    "control": _WHERE | _KEPT | {"step_speedup": NUMBER, "measured": NUMBER},
    "step": _WHERE | _KEPT | {
        "loss": LOSS, "loss_labels": LOSS, "loss_logits": LOSS, "loss_tokens": LOSS,
        "images": FINITE, "seconds": FINITE, "images_per_second": NUMBER, "phases": PHASES, "mfu": MAYBE, "goodput": MAYBE,
        "energy_kwh": MAYBE, "joules": NUMBER, "time_to_first_step": NUMBER, "memory_peak_mib": MAYBE, "chain": TEXT,
        "spent": SPENT,
    },
    "probe": _WHERE | {"probed": COUNT, "right": COUNT, "share": NUMBER, "multiply_adds": NUMBER, "seconds": NUMBER, "keep_tokens": NUMBER},
    "weights": _WHERE | {
        "kept": NUMBER, "weak": NUMBER, "multiply_adds": NUMBER, "bytes": TABLE, "norms": TABLE, "layers": TABLE, "event": TEXT,
    },
    "eval": _WHERE | _KEPT | {"top1": NUMBER, "images": NUMBER, "per_class": LIST},
    "density": _WHERE | _KEPT | {"top1": NUMBER, "images": NUMBER, "per_class": LIST},
    "checkpoint": _WHERE | {"path": TEXT},
    "broken": _WHERE,
    "skipped": _WHERE,
    "message": {"text": TEXT},
    "end": {
        "step": COUNT, "progress": NUMBER, "status": TEXT, "spent": SPENT, "by_cause": SPENT, "matrix_tflops": MAYBE,
        "paused": NUMBER, "starting": NUMBER, "world": WORLD, "goodput": MAYBE,
    },
}  # fmt: skip
REQUIRED = {"resume": ("step",)}


def wrong(line: dict[str, Any]) -> str | None:
    """What is wrong with a line of the journal, None where its readers can rely on it. Kinds and fields that are not known pass."""
    kind = line.get("kind")
    if not isinstance(kind, str):
        return f"kind={kind!r:.60} is not a text"
    if "time" not in line:
        return "no time"
    for name in REQUIRED.get(kind, ()):
        if name not in line:
            return f"{kind} without {name}"
    known = FIELDS.get(kind)
    for fields in (EVERY, known or {}):
        for name, (check, expected) in fields.items():
            if name in line and not check(line[name]):
                return f"{name}={line[name]!r:.60} is not {expected}"
    return None
