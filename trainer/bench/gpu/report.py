"""Rows of `make gpu`, each printed and written to OUT/gpu.jsonl as soon as it is known; a row that fails is a line, the next one follows.

A part is a function of a `Host` that yields (name, row); a row is a function without arguments that returns its facts. A fact `ok` says
whether a comparison holds. A part that takes longer than its limit is interrupted, and a line names the rows that it did not measure.
"""

from __future__ import annotations

import json
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


class _OverTime(Exception):
    """The limit of the part has passed."""


def run(parts: Mapping[str, Part], host: Host, show: Callable[[str], None], limit: float = 0.0) -> int:
    """Every row of the parts in order; the number of rows that failed or whose comparison does not hold. limit: seconds of a part (0:
    none); what it did not measure counts as one row that failed."""
    failed = 0
    for part, rows in parts.items():
        late: list[str] = []
        try:
            with _interrupted_after(limit) as over:
                for name, row in rows(host):
                    facts = {} if over() else _measured(row)
                    if not facts or (over() and not facts.get("ok", True)):
                        late.append(name)
                        continue
                    failed += not facts.get("ok", True)
                    record(part, name, facts, host, show)
        except Exception as error:  # while the part prepares its rows
            failed += 1
            record(part, "(part)", _failure(error), host, show)
        if late:
            failed += 1
            missing = {"error": f"limit of {limit:g} s; LIMIT= raises it", "not_measured": late}
            record(part, "(part)", {"ok": False, **missing}, host, show)
    return failed


@contextmanager
def _interrupted_after(limit: float) -> Iterator[Callable[[], bool]]:
    """Raises _OverTime inside the context, once, after `limit` seconds. Yields whether they have passed, because what is interrupted may
    raise something else. In the main thread only."""
    end = time.monotonic() + (limit or float("inf"))

    def interrupt(number: int, frame: object) -> None:
        raise _OverTime(f"not finished within the part's {limit:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield lambda: time.monotonic() >= end
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def record(part: str, name: str, facts: Facts, host: Host, show: Callable[[str], None] = print) -> None:
    """A line of the terminal, and one of OUT/gpu.jsonl."""
    mark = {True: "ok  ", False: "FAIL", None: "    "}[facts.get("ok")]
    words = "  ".join(f"{key} {_text(value)}" for key, value in facts.items() if key not in ("ok", "trace"))
    show(f"{mark}  {part:<7} {name:<44} {words}")
    if host.out is not None:
        host.out.mkdir(parents=True, exist_ok=True)
        with (host.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(_plain({"part": part, "row": name, "tiny": host.tiny, **facts}), default=str) + "\n")


def _plain(value: Any) -> Any:
    """Without nan and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
