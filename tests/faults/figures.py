"""Figures of the faults that were injected at random moments: the rows of docs/results/faults.jsonl as a table."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "faults.jsonl"
COLUMNS = (
    "fault", "injected", "survived", "examples lost", "repeated", "hangs", "s to the end of all ranks", "s to the next step",
    "steps computed again", "command typed again",
)  # fmt: skip


def results(file: Path = RESULTS) -> list[dict[str, Any]]:
    """A row per run."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def injected(file: Path, kind: str) -> int:
    return sum(len(row["faults"]) for row in results(file) if row["kind"] == kind)


def survived(row: dict[str, Any]) -> bool:
    """The run finished by itself and is the undisturbed one."""
    return row["finished"] and row["equal"] and row["audit"] and not any(fault["hang"] for fault in row["faults"])


def _spread(values: list[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} (at most {max(values):.{digits}f})" if values else "the ranks lived on"


def _row(kind: str, rows: list[dict[str, Any]]) -> str:
    faults = [fault for row in rows for fault in row["faults"]]
    ends, steps = ([fault[name] for fault in faults if fault[name] is not None] for name in ("to_exit", "to_step"))
    cells = (
        kind, len(faults), sum(len(row["faults"]) for row in rows if survived(row)), sum(row["lost"] for row in rows),
        sum(row["repeated"] for row in rows), sum(fault["hang"] for fault in faults), _spread(ends), _spread(steps),
        _spread([float(fault["again"]) for fault in faults], 0), sum(fault["typed"] for fault in faults),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def section(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the page; none without results."""
    if not rows:
        return []
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    hardware, dates, commits = (", ".join(dict.fromkeys(row[name] for row in rows)) for name in ("hardware", "date", "commit"))
    blocking = [value for row in rows for value in row["blocking"]]
    spent: dict[str, float] = {}
    for row in rows:
        for cause, seconds in row["by_cause"].items():
            spent[cause] = spent.get(cause, 0.0) + seconds
    whole = sum(spent.values())
    shares = ", ".join(
        f"{cause.replace('_', ' ')} {seconds / whole:.1%}" for cause, seconds in spent.items() if seconds / whole > 0.0005
    )
    return [
        "## At random moments",
        f"`python -m tests.faults.measure` (rows: [faults.jsonl](faults.jsonl)), {hardware}, {dates}, at {commits}. A DeiT of .1 M",
        "parameters on digits, two ranks, 60 steps, a checkpoint every 2 steps, `engine.timeout` and `data.timeout` 20 s; up to five",
        "faults in a run, each 0 to 5 s after a step of an attempt; faults that heal do so after 1 to 5 s, a cut beyond the limit after",
        "25 to 35 s. Survived: the run finished (where the fault ends the launcher: after the same command was typed again), its chains,",
        "losses and top-1 are those of the undisturbed run in every digit, and `trilevel audit` finds nothing. Two hosts are network",
        "namespaces; the disk is an ext4 of its own. Times are medians on a machine with other work, most of it the start of Python.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
        *(_row(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds),
        "",
        f"A save held training for {median(blocking):.2f} s in the median, {max(blocking):.2f} s at most ({len(blocking)} saves).",
        f"Time of these runs: {shares}.",
        "With a fault every few seconds the goodput is not that of a job of yours: `trilevel estimate CONFIG --mtbf 3h` computes that.",
        "",
        "Found here and corrected: at 97cdc44 `loader worker stopped` also stopped ranks, and a run hung whose rank 0 was stopped after",
        "the last step (at b8bd974 ranks exit together; that row was taken again); a run directory renamed for a while was begun anew.",
        "",
    ]
