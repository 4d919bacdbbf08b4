"""Rows of `make gpu`, each printed and written to OUT/gpu.jsonl as soon as it is known; a row that fails is a line, the next one follows.

A part is a function of a `Host` that yields (name, row); a row is a function without arguments that returns its facts. A fact `ok` says
whether a comparison holds.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Facts = dict[str, Any]
Row = tuple[str, Callable[[], Facts]]


@dataclass(frozen=True)
class Host:
    """device: what is measured. tiny: on a CPU, in the smallest form, to test the code; its numbers mean nothing. out: folder of results,
    or None."""

    device: torch.device
    tiny: bool
    out: Path | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


Part = Callable[[Host], Iterator[Row]]


def run(parts: Mapping[str, Part], host: Host, show: Callable[[str], None]) -> int:
    """Every row of the parts in order; the number of rows that failed or whose comparison does not hold."""
    failed = 0
    for part, rows in parts.items():
        try:
            for name, row in rows(host):
                facts = _measured(row)
                failed += not facts.get("ok", True)
                _report(part, name, facts, host, show)
        except Exception as error:  # while the part prepares its rows
            failed += 1
            _report(part, "(part)", _failure(error), host, show)
    return failed


def _measured(row: Callable[[], Facts]) -> Facts:
    started = time.perf_counter()
    try:
        facts = row()
    except Exception as error:
        facts = _failure(error)
    return facts | {"seconds": time.perf_counter() - started}


def _failure(error: Exception) -> Facts:
    lines = str(error).strip().splitlines() or [""]
    return {"ok": False, "error": f"{type(error).__name__}: {lines[0]}"[:300], "trace": traceback.format_exc()[-3000:]}


def _report(part: str, name: str, facts: Facts, host: Host, show: Callable[[str], None]) -> None:
    mark = {True: "ok  ", False: "FAIL", None: "    "}[facts.get("ok")]
    words = "  ".join(f"{key} {_text(value)}" for key, value in facts.items() if key not in ("ok", "trace"))
    show(f"{mark}  {part:<7} {name:<44} {words}")
    if host.out is not None:
        host.out.mkdir(parents=True, exist_ok=True)
        with (host.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps({"part": part, "row": name, "tiny": host.tiny, **facts}, default=str) + "\n")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
