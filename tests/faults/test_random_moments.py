"""One run of two ranks under `launch local --resume`, with faults at random moments: it restarts by itself and is the undisturbed run.

The seed of the moments is printed; TRILEVEL_FAULTS=SEED repeats one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import environment, lines
from tests.laws.test_main_job import RECIPE

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS, FAULTS, LONGEST = (
    40,
    3,
    8.0,
)  # steps of the run; faults, and the longest time in s from a step of an attempt to its fault
SETTINGS = ("control=0", "checkpoint.every=2step", "engine.timeout=20", "data.timeout=20", f"stop_at={STEPS}step", "epochs=8")
# which process, the signal
KINDS = {
    "rank 0 killed": ("rank 0", signal.SIGKILL),
    "rank 1 killed": ("rank 1", signal.SIGKILL),
    "loader worker killed": ("worker", signal.SIGKILL),
    "rank 1 stopped": ("rank 1", signal.SIGSTOP),
    "loader worker stopped": ("worker", signal.SIGSTOP),
}


def started(folder: Path) -> subprocess.Popen[bytes]:
    words = ["-m", "launch", "local", "job.yaml", *SETTINGS, "--processes", "2", "--resume", "--restarts", "4"]
    with (folder / "out.txt").open("ab") as out:
        return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT)


def victims(process: subprocess.Popen[bytes], which: str) -> list[psutil.Process]:
    """The processes of one kind below the launcher."""
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
        ranks = {one.environ().get("RANK"): one for one in below if "trainer" in one.cmdline() and "launch" not in one.cmdline()
                 and (parent := one.parent()) is not None and "trainer" not in _tail(parent)}  # fmt: skip
        if which == "worker":
            return [child for rank in ranks.values() for child in rank.children() if "trainer" in child.cmdline()]
        return [one for rank, one in ranks.items() if which == f"rank {rank}"]
    return []


def _tail(process: psutil.Process) -> list[str]:
    """The words of a rank begin with `python -u -m trainer`; an agent's name that module later."""
    return process.cmdline()[:4]


def steps_of_attempt(run: Path) -> tuple[int, int]:
    """The newest attempt, and how many steps it has logged."""
    rows = [json.loads(row) for row in (run / "journal.jsonl").read_bytes().splitlines(keepends=True) if row.endswith(b"\n")]
    newest = max((row["attempt"] for row in rows), default=-1)
    return newest, sum(row["kind"] == "step" and row["attempt"] == newest for row in rows)


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    assert started(folder).wait(900) == 0, (folder / "out.txt").read_text()[-4000:]
    return folder / "runs" / "job"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_survives_faults_at_random_moments(kind: str, undisturbed: Path, digits: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("TRILEVEL_FAULTS", random.randrange(10**6)))
    print(f"TRILEVEL_FAULTS={seed}")
    chosen, (which, number), run = random.Random(seed), KINDS[kind], tmp_path / "runs" / "job"
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    process, injected, end = started(tmp_path), set[int](), time.monotonic() + 1500
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
        attempt, steps = steps_of_attempt(run) if (run / "journal.jsonl").is_file() else (-1, 0)
        if steps and attempt not in injected and len(injected) < FAULTS:
            time.sleep(chosen.uniform(0, LONGEST))
            if found := victims(process, which):
                chosen.choice(found).send_signal(number)
                injected.add(attempt)
    output = (tmp_path / "out.txt").read_text()[-6000:]
    assert process.poll() == 0, f"seed {seed}\n{output}"
    assert injected, f"seed {seed}: the run ended before a fault"
    for field, of in (("chain", "step"), ("loss", "step"), ("top1", "eval")):
        assert [line[field] for line in lines(run, of)] == [line[field] for line in lines(undisturbed, of)], (
            f"seed {seed}, {field}"
        )
    assert [line["step"] for line in lines(run, "step")] == list(range(1, STEPS + 1)), "nothing lost, nothing twice"
    audit = [sys.executable, "-m", "trainer", "audit", str(run)]
    assert subprocess.run(audit, cwd=tmp_path, env=environment(), capture_output=True, timeout=300).returncode == 0
