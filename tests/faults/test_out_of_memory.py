"""The kernel kills a rank for lack of memory: the launcher starts the job again, and it is the undisturbed run.

The rank is moved into a memory cgroup while it trains, and the limit is set to what it uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import lines, wait_for
from tests.faults.live_job import started, steps_of_attempt, victims
from tests.laws.test_main_job import RECIPE
from tests.support.memory_cgroup import Cgroup, memory_cgroup
from trainer.__main__ import main

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    made = memory_cgroup()
    try:
        group = made.__enter__()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    made.__exit__(None, None, None)


def test_a_rank_that_the_kernel_kills_for_memory_starts_again(cgroup: Cgroup, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    run, process = tmp_path / "runs" / "job", started(tmp_path)
    try:
        wait_for(
            lambda: process.poll() is not None or ((run / "journal.jsonl").is_file() and steps_of_attempt(run)[1] >= 3), 300
        )
        (rank,) = victims(process, "rank 1")
        cgroup.squeeze(rank.pid, lambda: process.poll() is None, 300)
        assert cgroup.kills() == 1, "the kernel did it"
        assert process.wait(600) == 0, (tmp_path / "out.txt").read_text()[-4000:]
    finally:
        process.terminate()
    assert len(lines(run, "start")) == 2 and lines(run, "end")[-1]["status"] in ("finished", "stopped")
    assert main(["audit", str(run), "--json", os.devnull]) == 0
    output = (tmp_path / "out.txt").read_text()
    assert "SIGKILL" in output or "-9" in output, output[-3000:]
