"""The wall clock of a whole job jumps back by a day, or on by a year: no duration changes, nothing is lost, a resume continues.

The ranks run under the library of tests/support/wall_clock.py; the monotonic clock is untouched.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import environment, lines, torchrun, wait_for
from tests.laws.test_main_job import RECIPE
from tests.support.wall_clock import built, jumping
from trainer.__main__ import main

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = ("engine.kind=ddp", "engine.zero=0", "control=0", "checkpoint.every=5step", "stop_at=30step", "epochs=8")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (library := built(tmp_path_factory.mktemp("clock"))) is None:
        pytest.skip("no C compiler (Debian: apt-get install gcc)")
    return library


@pytest.mark.parametrize("seconds", [-86_400, 365 * 86_400])
def test_a_clock_that_jumps_under_a_job_changes_no_duration_and_loses_nothing(
    seconds: int, library: Path, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    run, mark = tmp_path / "runs" / "job", tmp_path / "jump"
    preload = jumping(library, mark, seconds)
    words = [sys.executable, *torchrun(2), "-m", "trainer", "train", "job.yaml", *SETTINGS]
    with (tmp_path / "out.txt").open("wb") as out:
        env = environment(**preload)
        process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=out, stderr=subprocess.STDOUT)
        journal = run / "journal.jsonl"
        wait_for(lambda: process.poll() is not None or (journal.is_file() and '"step":6,' in journal.read_text()), 300)
        mark.touch()
        assert process.wait(300) == 0, (tmp_path / "out.txt").read_text()[-4000:]
    probe = [sys.executable, "-c", "import time; print(time.time())"]
    shown = float(subprocess.run(probe, env=environment(**preload), capture_output=True, check=True).stdout)
    assert shown - time.time() == pytest.approx(seconds, abs=60), "the library does it"
    times = [line["time"] for line in lines(run, "step")]
    assert all(0 <= later - before < 300 for before, later in itertools.pairwise(times)), "the journal counts from its start"
    steps, (end,) = lines(run, "step"), lines(run, "end")
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert all(0 < line["seconds"] < 300 for line in steps) and 0 < end["seconds"] < 600
    assert all(0 <= value < 600 for value in end["spent"].values()) and 0 <= end["goodput"] <= 1
    assert sum(end["by_cause"].values()) < 600 and min(end["by_cause"].values()) >= 0
    again = [sys.executable, "-m", "trainer", "train", "job.yaml", *SETTINGS, "stop_at=32step", "--resume"]
    done = subprocess.run(again, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in lines(run, "step")] == list(range(1, 33))
    assert all(0 <= value < 900 for value in lines(run, "end")[-1]["by_cause"].values())
    assert main(["audit", str(run), "--json", os.devnull]) == 0 and main(["report", str(run)]) == 0
