"""Why runs are not comparable, or only partly: different data, validation set, pixels or hardware, or an unfinished run.

All runs are compared with each other, seeds of one group too: one on other hardware, or unfinished, would bias its group's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from trainer.analysis.history import History
from trainer.config.recorded import without_foreign
from trainer.config.run_config import flat

NAMED = 4  # runs listed by name in a sentence
# settings that affect neither results nor times
IGNORED_SETTINGS = frozenset(
    {"name", "runs", "seed", "stop_at", "log_every", "data.train", "data.validation", "data.workers", "data.timeout"}
)

Start = dict[str, Any]
_FACTS: tuple[tuple[str, Callable[[Start], Any], str], ...] = (
    ("validation set", lambda start: fingerprint(start, "validation"), "top-1 is not comparable"),
    ("train set", lambda start: fingerprint(start, "train"), "the runs trained on different images"),
    ("options that change pixels", lambda start: start.get("pixels") or [], "the runs trained on different pixels"),
    ("evaluation crop", lambda start: setting(start, "evaluate.crop_pct"), "top-1 is measured on different pixels"),
    ("image size", lambda start: setting(start, "model.image_size"), "time and accuracy are not comparable"),
    ("device", lambda start: start.get("device"), "times and device hours are not comparable"),
    ("processes", lambda start: start.get("world"), "compare device hours, not times"),
    ("torch", lambda start: (start.get("versions") or {}).get("torch"), "times may differ for this reason alone"),
    ("commit", lambda start: start.get("commit") and str(start["commit"])[:10], "the code may differ"),
)


def caveats(runs: Sequence[History]) -> list[str]:
    """Why these runs are not comparable, or only partly, one sentence each; empty if they are."""
    names = [run.name if [r.name for r in runs].count(run.name) == 1 else str(run.directory) for run in runs]
    found = []
    for what, read, then in _FACTS:
        found += _differ(what, [_text(read(run.start)) for run in runs], names, then)
    found += _differ(
        "score",
        ["of the EMA" if run.evals(ema=True) else "of the raw weights" for run in runs],
        names,
        "top-1 is of different kinds of weights",
    )
    dirty = [name for run, name in zip(runs, names, strict=True) if any(start.get("dirty") for start in run.starts)]
    if dirty:
        found.append(f"{_listed(dirty)} ran with uncommitted changes (see source.txt in the run directory)")
    for status in dict.fromkeys(run.status for run in runs if run.status != "finished"):
        cut = [name for run, name in zip(runs, names, strict=True) if run.status == status]
        verb = "is" if len(cut) == 1 else "are"
        found.append(f"{_listed(cut)} {verb} not finished ({status}): the last top-1 is not the final one")
    for run, name in zip(runs, names, strict=True):
        if skipped := len(run.of("skipped")):
            found.append(f"{name}: {skipped} of {run.last.step} steps were skipped (non-finite loss or gradient)")
        if changed := [text for a, b in pairwise(run.starts) for text in _changed(a, b)]:
            found.append(f"{name} changed between its attempts: {', '.join(changed)}")
    return found


def fingerprint(start: Start, split: str) -> Any:
    return ((start.get("data") or {}).get(split) or {}).get("fingerprint")


def setting(start: Start, key: str) -> Any:
    return flat(start.get("config") or {}).get(key)


def _differ(what: str, values: list[str], names: list[str], then: str) -> list[str]:
    having = {value: [name for name, own in zip(names, values, strict=True) if own == value] for value in dict.fromkeys(values)}
    if len(having) < 2:
        return []
    return [f"{what}: {', '.join(f'{value} in {_listed(having[value])}' for value in having)}; {then}"]


def _changed(before: Start, after: Start) -> list[str]:
    """What a resume changed: environment and settings."""
    a, b = (flat(without_foreign(start.get("config") or {})) for start in (before, after))
    own = {what for what, read, _ in _FACTS if read(before) == read(after)}
    found = [f"{what} {_text(read(before))} -> {_text(read(after))}" for what, read, _ in _FACTS if what not in own]
    keys = [key for key in a | b if key not in IGNORED_SETTINGS and not key.startswith("tracking.")]
    return found + [f"{key} {a.get(key)} -> {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    if more > 1:
        return f"{', '.join(names[:NAMED])} and {more} others"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _text(value: Any) -> str:
    return "unknown" if value is None else ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
