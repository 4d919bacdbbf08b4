"""Starts a run again after a failure, without a person, as long as its checkpoints advance between two failures.

A failure counts against `--restarts` while the newest checkpoint is the one of the failure before; a new checkpoint sets the count back
to 0. So a run of weeks survives any number of lost nodes, and a fault that returns at the same step ends the job after a few attempts.
Where the checkpoints of a run have gone, nothing is started: `--resume` would begin it anew.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch import yaml_file
from launch.job import BUSY, LATE, REFUSED, STOPPED, Job
from launch.processes import STOP
from launch.run_files import newest, written_since, written_until_now
from launch.sweep import about

RESTARTS = 3  # failures from the same checkpoint after which a job gives up
WAITS = (10.0, 60.0, 300.0, 900.0)  # s before the next attempt, by failures from one checkpoint: ports close, a server restarts
LOOK = 5.0  # s between two looks at the newest checkpoint
GONE = 600.0  # s to wait for a run directory that had checkpoints and has none, e.g. one on a file server that restarts
REPAIR, ASK = 1800.0, 60.0  # s to wait for nodes that fail their check, after the first attempt; s between two checks
MEANING = {
    REFUSED: " (refused)",
    LATE: " (a rank did not arrive)",
    STOPPED: " (saved and stopped, by a signal that did not come through this launcher)",
    BUSY: " (another process trains this run)",
}
Attempt = Callable[[list[int]], int]


class NotReadyError(Exception):
    """Why no attempt can start now, e.g. nodes that fail their check."""


class _SignalledError(Exception):
    """A signal came while no process of the run lived."""

    def __init__(self, number: int):
        self.code = 128 + number if number == signal.SIGINT else STOPPED
        super().__init__(signal.Signals(number).name)


class Restarts:
    """Decides after each failed attempt whether the next one starts, and prints the cause and what to type.

    directory: of the run. most: failures from one checkpoint, 0 = no restart. words: of this command, after `python -m launch`.
    """

    def __init__(self, directory: Path, most: int, words: list[str]):
        self.directory, self.most = directory, most
        self._again = shlex.join(["python", "-m", "launch", *words, *([] if "--resume" in words else ["--resume"])])
        self._attempt, self._failures, self._failed_at = 0, 0, ""
        self._offset, self._from, self._last = 0, "", ""

    def ready(self, prepare: Callable[[], Attempt]) -> Attempt | None:
        """The next attempt as soon as it can start; None where it cannot: at once for the first one, after REPAIR s for later ones."""
        end = time.monotonic() + (REPAIR if self._attempt and self.most else 0)
        asked = False
        while True:
            try:
                return prepare()
            except NotReadyError as why:
                if time.monotonic() >= end:
                    print(f"launch: {why}. After a repair: {self._again}", file=sys.stderr)
                    return None
                if not asked:
                    print(f"launch: {why}; asked again every {ASK:g} s, for {REPAIR / 60:g} minutes", file=sys.stderr)
                asked = True
            pause(ASK)

    def begin(self) -> None:
        """An attempt begins."""
        self._attempt += 1
        self._offset, self._from = written_until_now(self.directory), newest(self.directory)
        self._last = self._from or self._last

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Reads the newest checkpoint every LOOK s, so that one that was made and is gone at the end of the attempt is known."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK):
                self._last = newest(self.directory) or self._last

        threading.Thread(target=look, daemon=True).start()  # a file server that does not answer must not hold up the exit
        try:
            yield
        finally:
            over.set()

    def settled(self, code: int) -> int:
        """The exit code of the attempt that ended with `code`. What happens to a process after the last line loses nothing. A refused
        attempt wrote no line: a last line is then that of another process which trains this run."""
        ended = written_since(self.directory, self._offset).ended
        if code in (0, ended, REFUSED, BUSY) or ended is None:
            return code
        print(
            f"launch: attempt {self._attempt} had saved all when a process failed, was stopped or killed ({code}{MEANING.get(code, '')}); "
            f"exit code {ended}",
            file=sys.stderr,
        )
        return ended

    def again(self, code: int) -> float | None:
        """Seconds until the next attempt, None for no more; the one before ended with `code`. Waits up to GONE for checkpoints that were
        there and are not."""
        reached = newest(self.directory)
        began, cause, _ = written_since(self.directory, self._offset)
        head = f"launch: attempt {self._attempt} ended with {code}{MEANING.get(code, '')}: "
        if lost := self._last if self.most and not reached else "":
            print(
                f"launch: {self.directory}: checkpoint {lost} is gone; waiting {GONE:g} s for it to come back", file=sys.stderr
            )
            if not (reached := self._back()):
                print(
                    f"{head}{self.directory}/checkpoints is gone since {lost}, and the next attempt would begin the run anew, so it is "
                    f"not repeated. Bring the directory back (renamed? file system not mounted?), then: {self._again}",
                    file=sys.stderr,
                )
                return None
        if code == BUSY:  # after the first attempt it may be a rank of the one before, on a node that did not answer
            refused = self._attempt == 1
        else:
            refused = code == REFUSED and not began
        self._failures = self._failures + 1 if self._failures and reached == self._failed_at else 1
        self._failed_at = reached
        head += cause or ("see above" if refused or code == BUSY else "its journal has no last line: killed, or node lost")
        place = reached or "no checkpoint yet"
        if self.most and not refused and self._failures < self.most:
            seconds = WAITS[min(self._failures, len(WAITS)) - 1]
            count = f"failure {self._failures} of {self.most} from there"
            print(
                f"{head}\n  newest checkpoint: {place}, {count}; attempt {self._attempt + 1} starts in {seconds:g} s",
                file=sys.stderr,
            )
            return seconds
        why = (
            "refused before its first line in the journal, so it is not repeated"
            if refused and code == REFUSED
            else "not repeated while that one runs"
            if refused
            else f"{self._failures} failures from there, so it is not repeated (--restarts {self.most})"
            if self.most
            else "not repeated"
        )
        logs = self.directory / "logs"
        print(f"{head}\n  newest checkpoint: {place}; {why}. Logs: {logs}. After a repair: {self._again}", file=sys.stderr)
        return None

    def _back(self) -> str:
        """The newest checkpoint as soon as there is one again; "" after GONE s."""
        end = time.monotonic() + GONE
        while not (found := newest(self.directory)) and time.monotonic() < end:
            pause(1.0)
        return found


def repeated(prepare: Callable[[], Attempt], restarts: Restarts) -> int:
    """Attempts until one finishes, is stopped, or `restarts` gives up; the last one's exit code, or 75 for a signal between two attempts.

    prepare: checks nodes, raises NotReadyError or returns the attempt; that appends the signals that the launcher received to its argument.
    """
    try:
        while (attempt := restarts.ready(prepare)) is not None:
            received: list[int] = []
            restarts.begin()
            with restarts.watching():
                code = restarts.settled(attempt(received))
            if code == 0 or received or (code == STOPPED and not restarts.most):
                return code
            if (seconds := restarts.again(code)) is None:
                return code
            pause(seconds)
    except _SignalledError as signalled:
        print(f"launch: {signalled} between two attempts: no process of the run lives", file=sys.stderr)
        return signalled.code
    return 1


def pause(seconds: float) -> None:
    """Sleeps. Raises _SignalledError at a signal that would end the run."""
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in STOP}
    try:
        end = time.monotonic() + seconds
        while not came and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.2, left))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise _SignalledError(came[0])


def run_directory(job: Job) -> Path:
    """RUNS/NAME of a job, by its file and its settings."""
    name, runs = about(job.config, list(job.overrides))
    given = [yaml_file.value_of(text.partition("=")[2]) for text in job.overrides if text.startswith("name=")]
    return runs / (given[-1] if given else name)
