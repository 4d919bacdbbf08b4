"""The wall clock of a whole job jumps back by a day, or on by a year: no duration changes, nothing is lost, a resume continues.

The ranks run under a small C library (LD_PRELOAD) that adds the jump to the wall clock as soon as a file exists; the monotonic clock is
untouched, as when an administrator or NTP sets the clock.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import environment, lines, torchrun, wait_for
from tests.laws.test_main_job import RECIPE
from trainer.__main__ import main

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]
LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static time_t jump(void) { return access(getenv("JUMP_FILE"), F_OK) ? 0 : atol(getenv("JUMP_SECONDS")); }
int clock_gettime(clockid_t clock, struct timespec *found) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, found);
  if (clock == CLOCK_REALTIME) found->tv_sec += jump();
  return failed;
}
int gettimeofday(struct timeval *found, void *zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  found->tv_sec = now.tv_sec;
  found->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *found) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (found) *found = now.tv_sec;
  return now.tv_sec;
}
"""
SETTINGS = ("engine.kind=ddp", "engine.zero=0", "control=0", "checkpoint.every=5step", "stop_at=30step", "epochs=8")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clock")
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("no C compiler (Debian: apt-get install gcc)")
    (folder / "clock.c").write_text(LIBRARY)
    words = [compiler, "-shared", "-fPIC", "-o", str(folder / "clock.so"), str(folder / "clock.c"), "-ldl"]
    subprocess.run(words, check=True, capture_output=True)
    return folder / "clock.so"


@pytest.mark.parametrize("seconds", [-86_400, 365 * 86_400])
def test_a_clock_that_jumps_under_a_job_changes_no_duration_and_loses_nothing(
    seconds: int, library: Path, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    run, mark = tmp_path / "runs" / "job", tmp_path / "jump"
    preload = {"LD_PRELOAD": str(library), "JUMP_FILE": str(mark), "JUMP_SECONDS": str(seconds)}
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
