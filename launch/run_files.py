"""What the launcher reads of a run directory: the newest checkpoint, and what the journal has since an attempt began."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from launch.job import STOPPED

TAIL = 1 << 20  # bytes of a journal in which its last line lies
BEGUN = b'"kind":"start"'  # of an attempt that has its settings, its shards and its checkpoint


class Written(NamedTuple):
    """began: whether an attempt wrote its first line. cause: the reason in its last line, "" without one. ended: exit code of an attempt
    whose last line says that all of it is saved: 0, or 75 after a signal; None for any other."""

    began: bool
    cause: str
    ended: int | None = None


def newest(directory: Path) -> str:
    """Name of the newest checkpoint, "" without one. RUN/checkpoints/latest is read from here: all nodes share the run directory."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (directory / "checkpoints" / "latest").read_text().strip()
    return ""


def written_until_now(directory: Path) -> int:
    """Bytes of whole lines in the journal."""
    with contextlib.suppress(OSError), open(directory / "journal.jsonl", "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(start := max(0, size - TAIL))
        return start + file.read(size - start).rfind(b"\n") + 1
    return 0


def written_since(directory: Path, offset: int) -> Written:
    """What the journal has behind its first `offset` bytes. No clock is compared: those of nodes differ."""
    began, cause, ended = False, "", None
    with contextlib.suppress(OSError), open(directory / "journal.jsonl", "rb") as file:
        file.seek(offset)
        began = BEGUN in file.read(TAIL)  # among the first lines of an attempt
        file.seek(max(offset, os.fstat(file.fileno()).st_size - TAIL))
        rows = file.read().splitlines()
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
            line = json.loads(rows[-1] if rows else b"{}")
            if isinstance(line, dict) and line.get("kind") == "end":
                cause = str(line.get("reason", ""))
                if line.get("status") in ("finished", "stopped"):
                    ended = STOPPED if cause == "preempted" else 0
    return Written(began, cause, ended)
