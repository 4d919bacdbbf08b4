"""Why two runs may not be compared, or only in part: other data, another validation set, other pixels, other hardware."""

from __future__ import annotations

from typing import Any

from trainer.history import History
from trainer.measures import flat


def differences(base: History, ours: History) -> list[str]:
    """Why two runs may not be compared, or only in part; empty when nothing stands against it."""
    found = []

    def differ(what: str, a: Any, b: Any, then: str) -> None:
        if a != b:
            found.append(f"{what}: {_said(a)} in {base.name}, {_said(b)} in {ours.name}; {then}")

    for split, then in (
        ("validation", "top-1 is of other images: not comparable"),
        ("train", "they learned from other images"),
    ):
        a, b = ((run.start.get("data") or {}).get(split) or {} for run in (base, ours))
        differ(f"{split} set", a.get("fingerprint"), b.get("fingerprint"), then)
    differ(
        "options that change pixels", base.start.get("pixels") or [], ours.start.get("pixels") or [], "they saw other pixels"
    )
    differ("evaluation crop", _set(base, "evaluate.crop_pct"), _set(ours, "evaluate.crop_pct"), "top-1 is of other pixels")
    differ(
        "image size", _set(base, "model.image_size"), _set(ours, "model.image_size"), "time and accuracy are of other inputs"
    )
    differ("device", base.start.get("device"), ours.start.get("device"), "times and device hours are not comparable")
    differ("processes", base.start.get("world"), ours.start.get("world"), "compare device hours, not times")
    a, b = ((run.start.get("versions") or {}).get("torch") for run in (base, ours))
    differ("torch", a, b, "times may differ for that alone")
    differ("commit", base.start.get("commit"), ours.start.get("commit"), "the code may differ")
    for run in (base, ours):
        if run.start.get("dirty"):
            found.append(f"{run.name} ran with uncommitted changes; they are in its source.txt")
        if run.status != "finished":
            found.append(f"{run.name} is not finished ({run.status}); its last score is not its final one")
    return found


def _set(run: History, key: str) -> Any:
    return flat(run.config).get(key)


def _said(value: Any) -> str:
    return "not told" if value is None else ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
