"""Standard input, output and error of this process: opened where the shell closed them, silent where they fail.

What a person sees must not end a run: a closed terminal (EIO), a closed pipe (EPIPE) or a full disk under a log (ENOSPC) costs lines
and nothing else, and the exit code stays that of the run.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from trainer.config.errors import TrilevelError


class Forgiving:
    """A text stream that ignores OSError: what can't be written is left out. Everything else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file was closed
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OutputError(TrilevelError, OSError):
    """A result could not be written to standard output."""


class Reporting(Forgiving):
    """A text stream that names itself in its errors. A pipe whose reader has gone stays a BrokenPipeError."""

    def write(self, text: str) -> int:
        with _named():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _named():
            self._stream.flush()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        text = f"standard output: {error.strerror}; the result is incomplete, free space or write it elsewhere"
        raise OutputError(text) from error


def forgiving(stream: TextIO) -> TextIO:
    """The stream as one that never raises OSError."""
    return stream if type(stream) is Forgiving else cast(TextIO, Forgiving(stream))


def open_standard_streams() -> None:
    """The first thing that a command does: descriptors 0 to 2 that the shell closed (`>&-`) become /dev/null, or the next file that is
    opened (a journal) would get their number and what libraries print. Characters that the terminal's encoding lacks are written as
    escapes."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open as long as the process lives)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            cast(Any, stream).reconfigure(errors="backslashreplace")


def guard_standard_streams(forgive: bool) -> None:
    """From here on no `print` of this process, and none of its libraries, raises OSError; without `forgive` those to standard output
    raise OutputError, as of a command that prints its result."""
    sys.stdout = forgiving(sys.stdout) if forgive else cast(TextIO, Reporting(sys.stdout))
    sys.stderr = forgiving(sys.stderr)


def discard_output() -> None:
    """What is still buffered, and what follows, goes nowhere: the interpreter flushes at its end and would turn a failure there into
    exit code 120."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def say(text: str, error: bool = False) -> None:
    """Print a line to standard output (or error) of a run; where that fails the line is left out."""
    stream = sys.stderr if error else sys.stdout
    if stream is not None:
        print(text, file=forgiving(stream), flush=True)
