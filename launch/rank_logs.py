"""Output of processes: each line is shown here and appended to the file of its node or rank.

With `--tee` torchrun prefixes each line with its rank. It also reads half lines (a progress bar, a print without a newline), and then
another rank's prefix stands in the middle of a line.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path
from typing import IO

from launch.job import LaunchError

RANK = re.compile(rb"\x1e(?=\[rank (\d+)\] )")  # `job.PREFIX`, filled in


def ensure_folder(folder: Path, asked: str) -> Path:
    """Create the folder if needed. Raises LaunchError with the flag that named it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{asked}: cannot create {folder}: {error.strerror}; name another folder") from error
    return folder


def copy_node(stream: IO[bytes], name: str, folder: Path) -> None:
    """A node's output: here with its name before each line, unchanged in NAME.txt."""
    file = None
    for line in stream:
        line = line.replace(b"\r\n", b"\n")
        file = _write(folder / f"{name}.txt", file, line)
        _show(f"[{name}] ".encode() + line)


def copy_ranks(stream: IO[bytes], folder: Path) -> None:
    """A launcher's output: here one line for each piece; each rank's own output, unchanged, in rank-N.txt."""
    files: dict[str, IO[bytes] | None] = {}
    for line in stream:
        found = list(RANK.finditer(line))
        ends = [one.start() for one in found[1:]] + [len(line)]
        if not found or found[0].start():  # the launcher's own output
            _show(line[: found[0].start()] + b"\n" if found else line)
        for one, end in zip(found, ends, strict=False):
            piece = line[one.end() : end]
            name = f"rank-{int(one[1])}.txt"
            files[name] = _write(folder / name, files.get(name), piece.partition(b"] ")[2])
            _show(piece if piece.endswith(b"\n") else piece + b"\n")


# The pipe must be read to its end, or the job stops at its next line: a full disk or a closed terminal costs lines, nothing else.
def _write(path: Path, file: IO[bytes] | None, line: bytes) -> IO[bytes] | None:
    """Append the line (a requeued job continues in the same files); returns the open file."""
    with contextlib.suppress(OSError):
        if file is None:
            file = path.open("ab", buffering=0)
            file.write(f"-- {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        file.write(line)
    return file


def _show(line: bytes) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(line)  # bytes: the output need not fit the terminal's encoding
        sys.stdout.buffer.flush()
