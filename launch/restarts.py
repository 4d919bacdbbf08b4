"""Starts a run again after a failure, without a person, as long as its checkpoints advance between two failures.

The newest checkpoint is the file RUN/checkpoints/latest, read from here: the nodes of a job share the run directory. A failure counts
against `--restarts` while the newest checkpoint is the one of the failure before; a new checkpoint sets the count back to 0. So a run of
weeks survives any number of lost nodes, and a fault that returns at the same step ends the job after a few attempts. Where the
checkpoints of a run have gone, nothing is started: `--resume` would begin it anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch import yaml_file
from launch.job import LATE, STOPPED, Job
from launch.sweep import about

RESTARTS = 3  # failures from the same checkpoint after which a job gives up
REFUSED = 2  # the trainer's exit code for a wrong setting, broken data, a store that is gone
WAIT = 10.0  # s between a failure and the next attempt: ports close, a lost node is noticed
LOOK = 5.0  # s between two looks at the newest checkpoint
GONE = 600.0  # s to wait for a run directory that had checkpoints and has none, e.g. one on a file server that restarts
TAIL = 1 << 20  # bytes of a journal in which its last line lies


class Restarts:
    """Decides after each failed attempt whether the next one starts, and prints the cause and what to type.

    directory: of the run. most: failures from one checkpoint, 0 = no restart. words: of this command, after `python -m launch`.
    """

    def __init__(self, directory: Path, most: int, words: list[str]):
        self.directory, self.most = directory, most
        self._again = shlex.join(["python", "-m", "launch", *words, *([] if "--resume" in words else ["--resume"])])
        self._attempt, self._failures, self._failed_at = 0, 0, ""
        self._began, self._from, self._last = 0.0, "", ""

    def begin(self) -> None:
        """An attempt begins."""
        self._attempt += 1
        self._began, self._from = time.time(), newest(self.directory)
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

    def again(self, code: int) -> bool:
        """Whether to start the next attempt; the one before ended with `code`. Waits up to GONE for checkpoints that were there and are
        not: an attempt without them would begin the run anew."""
        reached = newest(self.directory)
        if lost := self._last if self.most and not reached else "":
            reached = self._back(lost)
            if not reached:
                print(
                    f"launch: attempt {self._attempt} ended with {code}{MEANING.get(code, '')}: {self.directory}/checkpoints is gone "
                    f"since {lost}, and the next attempt would begin the run anew, so it is not repeated. Bring the directory back "
                    f"(renamed? file system not mounted?), then: {self._again}",
                    file=sys.stderr,
                )
                return False
        refused = code == REFUSED and reached == self._from
        self._failures = self._failures + 1 if self._failures and reached == self._failed_at else 1
        self._failed_at = reached
        cause = cause_of(self.directory, self._began) or (
            "see above" if refused else "its journal has no last line: killed, or node lost"
        )
        head = f"launch: attempt {self._attempt} ended with {code}{MEANING.get(code, '')}: {cause}"
        place = reached or "no checkpoint yet"
        if self.most and not refused and self._failures < self.most:
            count = f"failure {self._failures} of {self.most} from there"
            print(
                f"{head}\n  newest checkpoint: {place}, {count}; attempt {self._attempt + 1} starts in {WAIT:g} s",
                file=sys.stderr,
            )
            return True
        why = (
            "refused before a new checkpoint, so it is not repeated"
            if refused
            else f"{self._failures} failures from there, so it is not repeated (--restarts {self.most})"
            if self.most
            else "not repeated"
        )
        logs = self.directory / "logs"
        print(f"{head}\n  newest checkpoint: {place}; {why}. Logs: {logs}. After a repair: {self._again}", file=sys.stderr)
        return False

    def _back(self, lost: str) -> str:
        """The newest checkpoint as soon as there is one again; "" after GONE s."""
        print(f"launch: {self.directory}: checkpoint {lost} is gone; waiting {GONE:g} s for it to come back", file=sys.stderr)
        end = time.monotonic() + GONE
        while not (found := newest(self.directory)) and time.monotonic() < end:
            time.sleep(1.0)
        return found


MEANING = {REFUSED: " (refused)", LATE: " (a rank did not arrive)"}


def repeated(attempt: Callable[[list[int]], int], restarts: Restarts) -> int:
    """Attempts until one finishes, is stopped, or `restarts` gives up; the last one's exit code. attempt: appends the signals that the
    launcher received to its argument."""
    while True:
        received: list[int] = []
        restarts.begin()
        with restarts.watching():
            code = attempt(received)
        try:
            if code in (0, STOPPED) or received or not restarts.again(code):
                return code
            time.sleep(WAIT)
        except KeyboardInterrupt:
            return 130


def run_directory(job: Job) -> Path:
    """RUNS/NAME of a job, by its file and its settings."""
    name, runs = about(job.config, list(job.overrides))
    given = [yaml_file.value_of(text.partition("=")[2]) for text in job.overrides if text.startswith("name=")]
    return runs / (given[-1] if given else name)


def newest(directory: Path) -> str:
    """Name of the newest checkpoint, "" without one."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (directory / "checkpoints" / "latest").read_text().strip()
    return ""


def cause_of(directory: Path, since: float) -> str:
    """The reason in the journal's last line, if it was written after `since` (unix seconds); else ""."""
    with contextlib.suppress(OSError), open(directory / "journal.jsonl", "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        rows = file.read().splitlines()
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
            line = json.loads(rows[-1] if rows else b"{}")
            if isinstance(line, dict) and line.get("kind") == "end" and float(line.get("time", 0)) >= since:
                return str(line.get("reason", ""))
    return ""
