"""A job of two ranks under `launch ... --resume` that is disturbed from outside: its processes and how far it is."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import environment
from tests.laws.test_main_job import RECIPE

STEPS = 60  # of a run
LIMIT = 20  # engine.timeout and data.timeout, s
SETTINGS = (
    "control=0", "checkpoint.every=2step", f"engine.timeout={LIMIT}", f"data.timeout={LIMIT}", f"stop_at={STEPS}step", "epochs=12",
)  # fmt: skip


@dataclass
class Job:
    """A job that trains in `folder`. start: types its command; below: its processes; at: what a fault acts on beside processes
    (server, hosts, file), as the place of the job made it (tests/faults/places.py)."""

    folder: Path
    start: Callable[[], subprocess.Popen[Any]]
    below: Callable[[subprocess.Popen[Any]], Iterable[psutil.Process]]
    at: Any = None
    process: subprocess.Popen[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.process = self.start()

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "job"

    def ranks(self) -> dict[str | None, psutil.Process]:
        """By their number; the agent of torchrun or accelerate is None."""
        return ranks_among(self.below(self.process))

    def find(self, which: str) -> list[psutil.Process]:
        """The processes of one kind: "rank N" or "worker"."""
        return victims_among(self.ranks(), which)

    def send(self, which: str, number: signal.Signals, chosen: random.Random) -> bool:
        """A signal to a process of one kind; False where none lives."""
        found = self.find(which)
        if found:
            with contextlib.suppress(psutil.NoSuchProcess):
                chosen.choice(found).send_signal(number)
        return bool(found)

    def end(self) -> None:
        """Leaves nothing running, stopped processes neither."""
        for one in self.ranks().values():
            with contextlib.suppress(psutil.Error):
                one.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def started(folder: Path, env: dict[str, str] | None = None, settings: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """`launch local` in `folder`; its output goes to out.txt. settings: after SETTINGS."""
    words = ["-m", "launch", "local", "job.yaml", *SETTINGS, *settings, "--processes", "2", "--resume", "--restarts", "20"]
    with (folder / "out.txt").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment(**(env or {})), stdout=out, stderr=subprocess.STDOUT
        )


def children(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def ranks_among(processes: Iterable[psutil.Process]) -> dict[str | None, psutil.Process]:
    """The ranks, by their number."""
    found: dict[str | None, psutil.Process] = {}
    for one in processes:
        with contextlib.suppress(psutil.Error):
            words, parent = one.cmdline(), one.parent()
            if "trainer" in words and "launch" not in words and parent is not None and "trainer" not in parent.cmdline()[:4]:
                found[one.environ().get("RANK")] = one  # the words of a rank begin with `python -u -m trainer`
    return found


def victims_among(ranks: dict[str | None, psutil.Process], which: str) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        if which == "worker":
            parents = [one for rank, one in ranks.items() if rank is not None]  # the children of the agent are the ranks
            return [child for one in parents for child in one.children() if "trainer" in child.cmdline()]
        return [one for rank, one in ranks.items() if which == f"rank {rank}"]
    return []


def victims(process: subprocess.Popen[bytes], which: str) -> list[psutil.Process]:
    """The processes of one kind below a local launcher."""
    return victims_among(ranks_among(children(process)), which)


def lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def steps_of_attempt(run: Path) -> tuple[int, int]:
    """The newest attempt, and how many steps it has logged."""
    newest, steps, _ = newest_steps(run)
    return newest, steps


def newest_steps(run: Path) -> tuple[int, int, int]:
    """The newest attempt, how many steps it has logged, the last step of the journal."""
    try:
        rows = [
            json.loads(row) for row in (run / "journal.jsonl").read_bytes().splitlines(keepends=True) if row.endswith(b"\n")
        ]
    except OSError:  # not there yet, or its disk is away
        return -1, 0, 0
    newest = max((row["attempt"] for row in rows), default=-1)
    steps = [row for row in rows if row["kind"] == "step"]
    return newest, sum(row["attempt"] == newest for row in steps), steps[-1]["step"] if steps else 0


def recipe(folder: Path, shards: object) -> None:
    """job.yaml over a folder of shards."""
    (folder / "job.yaml").write_text(RECIPE.replace("DIGITS", str(shards)))


def undisturbed(folder: Path, shards: Path) -> Path:
    """The run that all others have to equal. Raises AssertionError with its output where it fails."""
    recipe(folder, shards)
    assert started(folder).wait(1800) == 0, (folder / "out.txt").read_text()[-4000:]
    return folder / "runs" / "job"
