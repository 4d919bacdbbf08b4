"""Read a journal: all lines, from an offset, or only the lines whose weights survived the restarts. A file NAME.jsonl.xz is a
compressed journal, as `launch study` keeps them."""

from __future__ import annotations

import json
import lzma
import warnings
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from trainer.journal import lines as checks
from trainer.journal.file import JournalError, finite

FILE = "journal.jsonl"
COMPRESSED = ".xz"


# Fields that identify a line if an attempt writes it again after its resume point.
_IDENTITY = {
    "step": ("step",),
    "epoch": ("epoch",),
    "plateau": ("step",),
    "eval": ("step", "ema"),
    "density": ("step", "ema", "keep_tokens"),
    "checkpoint": ("step",),
    "probe": ("step",),
}


def read(directory: Path | str) -> Iterator[dict[str, Any]]:
    """Every complete line, oldest first; skips an incomplete last line, and unreadable ones elsewhere with a warning.

    `directory` is a run directory or a journal file; raises JournalError if it does not exist.
    """
    for _, line in read_from(directory, 0):
        yield line


def read_from(directory: Path | str, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Complete lines from byte `offset` on, each with the offset after it, from which a follower can continue."""
    path = _file_of(directory)
    with _opened(path) as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            try:
                line = json.loads(raw)
                kind = line["kind"]
                line = finite(line) | {"kind": kind}
                reason = checks.wrong(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                reason = "it is not a journal line"
            if reason:
                warnings.warn(f"{path}: the line that ends at byte {offset} is left out: {reason}", stacklevel=2)
                continue
            yield offset, line


def _opened(path: Path) -> BinaryIO:
    try:
        if path.suffix != COMPRESSED:
            return path.open("rb")
        return BytesIO(lzma.decompress(path.read_bytes()))
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}; make it readable for this user, or read a copy") from error
    except (lzma.LZMAError, EOFError) as error:
        raise JournalError(f"{path}: not a whole .xz file ({error}); restore it from the repository, or remove it") from error


def lineage(directory: Path | str) -> Iterator[dict[str, Any]]:
    """The lines of the lineage, oldest first: without the lines of a killed attempt after the step from which a later one resumed,
    and without the lines that the later attempt repeated at that step. Keeps all `start` and `end` lines.

    A line without `step` has the step of the previous line of its attempt. Memory: one entry per eval, epoch and plateau.
    """
    resumed = cuts(read(directory))
    seen: set[tuple[Any, ...]] = set()
    position: dict[int, int] = {}
    for line in read(directory):
        kind, attempt = line["kind"], line.get("attempt", 0)
        position[attempt] = line["step"] if isinstance(line.get("step"), int) else position.get(attempt, 0)
        if kind not in ("start", "end"):
            if position[attempt] > min((step for later, step in resumed.items() if later > attempt), default=position[attempt]):
                continue
            if kind in _IDENTITY and kind != "step":  # steps can't repeat: the later attempt starts after the cut
                name = (kind, *(line.get(field) for field in _IDENTITY[kind]))
                if name in seen:
                    continue
                seen.add(name)
        yield line


def last_attempt(directory: Path | str) -> int:
    """The highest attempt in the journal, -1 without a journal."""
    path = _file_of(directory, must=False)
    return max((line.get("attempt", 0) for line in read(path)), default=-1) if path.exists() else -1


def cuts(lines: Iterable[dict[str, Any]]) -> dict[int, int]:
    """{attempt: the step it resumed from}, for attempts after the first that logged any work."""
    cuts: dict[int, int] = {}
    first: int | None = None
    for line in lines:
        attempt = line.get("attempt", 0)
        first = attempt if first is None else first
        if line["kind"] == "resume":
            cuts[attempt] = line["step"]
        elif attempt != first and attempt not in cuts and line["kind"] in _IDENTITY:
            cuts[attempt] = 0  # no resume line: it started from scratch
    return cuts


def _file_of(directory: Path | str, must: bool = True) -> Path:
    path = Path(directory)
    path = path if path.suffix in (".jsonl", COMPRESSED) else path / FILE
    if must and not path.is_file():
        raise JournalError(f"{path}: no such journal; give the directory of a run, e.g. runs/NAME")
    return path
