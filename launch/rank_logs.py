"""What processes say: each line goes on to us, and to the file of the node or rank that said it.

Ranks are told apart by torchrun: `--tee` writes what each one says to a file and reads it out again with a prefix before each line. It
reads half lines, too (a progress bar, a print without an end), and then another rank's prefix stands in the middle of a line.
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
    """The folder, which is there now. Raises LaunchError, naming what was asked for, where it can't be had."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{asked}: {folder} can't be made: {error.strerror}; name another folder") from error
    return folder


def copy_node(stream: IO[bytes], name: str, folder: Path) -> None:
    """A node's output: with its name before each line here, as it came in NAME.txt."""
    file = None
    for line in stream:
        line = line.replace(b"\r\n", b"\n")
        file = _write(folder / f"{name}.txt", file, line)
        _show(f"[{name}] ".encode() + line)


def copy_ranks(stream: IO[bytes], folder: Path) -> None:
    """A launcher's output: a line here for each piece, and what each rank says, as it came, in rank-N.txt."""
    files: dict[str, IO[bytes] | None] = {}
    for line in stream:
        found = list(RANK.finditer(line))
        ends = [one.start() for one in found[1:]] + [len(line)]
        if not found or found[0].start():  # the launcher's own words
            _show(line[: found[0].start()] + b"\n" if found else line)
        for one, end in zip(found, ends, strict=False):
            piece = line[one.end() : end]
            name = f"rank-{int(one[1])}.txt"
            files[name] = _write(folder / name, files.get(name), piece.partition(b"] ")[2])
            _show(piece if piece.endswith(b"\n") else piece + b"\n")


# Who reads must go on reading: a pipe that nobody empties stops the job at its next line. So a full disk or a closed terminal
# costs lines, and nothing else.
def _write(path: Path, file: IO[bytes] | None, line: bytes) -> IO[bytes] | None:
    """The line behind what earlier starts wrote (a requeued job goes on in the same files); the open file."""
    with contextlib.suppress(OSError):
        if file is None:
            file = path.open("ab", buffering=0)
            file.write(f"-- {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        file.write(line)
    return file


def _show(line: bytes) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(line)  # bytes: what ranks say need not fit the terminal's encoding
        sys.stdout.buffer.flush()
