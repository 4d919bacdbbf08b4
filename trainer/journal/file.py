"""The file of a journal: one writer, no incomplete lines, JSON values. Its content is described in `writer`."""

from __future__ import annotations

import fcntl
import math
import os
from pathlib import Path
from typing import Any

from trainer.config.errors import TrilevelError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JournalError(TrilevelError, RuntimeError):
    """The journal can't be written or read; the message names the file and the remedy."""


class JournalInUseError(JournalError):
    """Another process writes the journal. A launcher that reads this code does not start the run beside that one again and again."""

    exit_code = 73


def lock(file: int, path: Path) -> None:
    """Raises JournalInUseError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalInUseError(
            f"{path}: another process is writing it; wait until it ends, or start another run with name=NEW_NAME"
        ) from None
    except OSError:
        pass  # a file system without locks: only rank 0 writes, but two runs are not detected


def repair(file: int) -> int:
    """Remove an incomplete last line, left by a kill; returns the size of the rest."""
    size = os.fstat(file).st_size
    end = size
    while end > 0:
        begin = max(0, end - 65536)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < size:
        os.ftruncate(file, end)
    return end


def plain(value: Any) -> Any:
    """Convert to JSON values: numpy and 0-d tensors become numbers, non-finite numbers strings, paths and the like strings."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def finite(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value
