"""Output of processes: each line is shown here and appended to the file of its node or rank.

With `--tee` torchrun prefixes each line with its rank. It also reads half lines (a progress bar, a print without a newline), and then
another rank's prefix stands in the middle of a line.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import IO, Any, TextIO, cast

from launch.job import LaunchError

RANK = re.compile(rb"\x1e(?=\[rank (\d+)\] )")  # `job.PREFIX`, filled in


class Forgiving:
    """A text stream that ignores OSError: lines that a closed terminal or a full disk does not take are left out."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_standard_streams() -> None:
    """The first thing that the launcher does: descriptors 0 to 2 that the shell closed (`>&-`) become /dev/null, in its processes too."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open as long as the process lives)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def forgive_standard_streams() -> None:
    """From here on no `print` raises OSError: a job goes on when the terminal that started it is gone."""
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), Forgiving):
            setattr(sys, name, cast(TextIO, Forgiving(stream)))


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
            file = open(path, "ab", buffering=0, opener=_opened)  # noqa: SIM115 (open until the process ends)
            file.write(f"-- {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        file.write(line)
    return file


def _opened(path: str, flags: int) -> int:
    """A link that another user put there is not followed, a FIFO does not block."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _show(line: bytes) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(line)  # bytes: the output need not fit the terminal's encoding
        sys.stdout.buffer.flush()
