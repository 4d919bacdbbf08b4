"""Standard input, output and error of this process: opened where the shell closed them, silent where they fail.

What a person sees must not end a run: a closed terminal (EIO), a closed pipe (EPIPE) or a full disk under a log (ENOSPC) costs lines
and nothing else, and the exit code stays that of the run. Nor may it stop one: a full pipe whose reader does not read, or a terminal
after Ctrl-S, costs WAIT seconds, then lines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import stat
import sys
import time
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


WAIT = 5.0  # seconds that a run waits for a reader of its output
PIECE = 4096  # PIPE_BUF: a pipe that is ready takes so many bytes at once


class Bounded(Forgiving):
    """A text stream of a run: a text for which a pipe, a terminal or a socket has no space for WAIT seconds is left out, and so are later
    ones, without a wait, until there is space again. A write that blocks would go on after every signal, and the run would stand still."""

    def __init__(self, stream: TextIO):
        super().__init__(stream)
        self._own: tuple[os.stat_result | None, int] = None, -1  # what `_nonblocking` opened, and its descriptor
        self._stuck = self._logged = False

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if self._own[1] >= 0:
                os.close(self._own[1])

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            if (file := self._blocking()) is None:
                return super().write(text)
            encoding, errors = getattr(self._stream, "encoding", None), getattr(self._stream, "errors", None)
            taken = self._send(file, text.encode(encoding or "utf-8", errors or "backslashreplace"))
            self._stuck = not taken
            if not taken and not self._logged:
                self._logged = True
                logging.getLogger("trilevel").warning("output is not read: what is printed until it is read again is left out")
        return len(text)

    def _blocking(self) -> int | None:
        """The descriptor, if writes to it can wait for a reader."""
        try:
            file = self._stream.fileno()
            mode = os.fstat(file).st_mode
        except (OSError, ValueError, AttributeError):  # closed, or a stream without a descriptor
            return None
        return file if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode) else None

    def _send(self, file: int, data: bytes) -> bool:
        """Whether all of it was written."""
        deadline = time.monotonic() + (0 if self._stuck else WAIT)
        own = self._nonblocking(file)
        poll = select.poll()
        poll.register(file, select.POLLOUT)
        while data:
            try:
                if own < 0 and not poll.poll(0):
                    raise BlockingIOError
                data = data[os.write(own if own >= 0 else file, data[:PIECE]) :]
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(1000 * min(left, 0.1))  # a terminal can be ready and yet take nothing
        return True

    def _nonblocking(self, file: int) -> int:
        """The same pipe or terminal, opened again: O_NONBLOCK on `file` would change it for all processes that share it. -1 for a socket,
        and where that is not permitted: then a write follows a poll."""
        about, own = self._own
        there = os.fstat(file)
        if about is None or not os.path.samestat(about, there):
            if own >= 0:
                os.close(own)
            try:
                own = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:
                own = -1
            self._own = there, own
        return own


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
    return stream if type(stream) in (Forgiving, Bounded) else cast(TextIO, Forgiving(stream))


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
    """From here on no `print` of this process, and none of its libraries, raises OSError or waits for long, as of a run; without
    `forgive` those to standard output raise OutputError, as of a command that prints its result, and all wait."""
    if forgive:
        sys.stdout, sys.stderr = (cast(TextIO, Bounded(stream)) for stream in (sys.stdout, sys.stderr))
    else:
        sys.stdout, sys.stderr = cast(TextIO, Reporting(sys.stdout)), forgiving(sys.stderr)


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
