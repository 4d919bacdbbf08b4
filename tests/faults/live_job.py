"""A job of two ranks under `launch local --resume` that is disturbed from outside: its processes and how far it is."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
    """A job that trains in `folder`."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "job"

    def send(self, which: str, number: signal.Signals, chosen: random.Random) -> bool:
        """A signal to a process of one kind; False where none lives."""
        found = victims(self.process, which)
        if found:
            with contextlib.suppress(psutil.NoSuchProcess):
                chosen.choice(found).send_signal(number)
        return bool(found)


def started(folder: Path, restarts: int = 20) -> subprocess.Popen[bytes]:
    words = ["-m", "launch", "local", "job.yaml", *SETTINGS, "--processes", "2", "--resume", "--restarts", str(restarts)]
    with (folder / "out.txt").open("ab") as out:
        return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT)


def ranks_of(process: subprocess.Popen[bytes]) -> dict[str | None, psutil.Process]:
    """The ranks below a launcher, by their number."""
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
        return {one.environ().get("RANK"): one for one in below if "trainer" in one.cmdline() and "launch" not in one.cmdline()
                and (parent := one.parent()) is not None and "trainer" not in _tail(parent)}  # fmt: skip
    return {}


def victims(process: subprocess.Popen[bytes], which: str) -> list[psutil.Process]:
    """The processes of one kind below the launcher: "rank N" or "worker"."""
    ranks = ranks_of(process)
    with contextlib.suppress(psutil.Error):
        if which == "worker":
            return [child for rank in ranks.values() for child in rank.children() if "trainer" in child.cmdline()]
        return [one for rank, one in ranks.items() if which == f"rank {rank}"]
    return []


def _tail(process: psutil.Process) -> list[str]:
    """The words of a rank begin with `python -u -m trainer`; an agent's name that module later."""
    return process.cmdline()[:4]


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
    if not (run / "journal.jsonl").is_file():
        return -1, 0, 0
    rows = [json.loads(row) for row in (run / "journal.jsonl").read_bytes().splitlines(keepends=True) if row.endswith(b"\n")]
    newest = max((row["attempt"] for row in rows), default=-1)
    steps = [row for row in rows if row["kind"] == "step"]
    return newest, sum(row["attempt"] == newest for row in steps), steps[-1]["step"] if steps else 0


def recipe(folder: Path, shards: Path) -> None:
    """job.yaml over a folder of shards."""
    (folder / "job.yaml").write_text(RECIPE.replace("DIGITS", str(shards)))


def undisturbed(folder: Path, shards: Path) -> Path:
    """The run that all others have to equal. Raises AssertionError with its output where it fails."""
    recipe(folder, shards)
    assert started(folder).wait(1800) == 0, (folder / "out.txt").read_text()[-4000:]
    return folder / "runs" / "job"
