"""The kernel kills a rank for lack of memory: the launcher starts the job again, and it is the undisturbed run.

The rank is moved into a memory cgroup while it trains, and the limit is set to what it uses.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import lines, wait_for
from tests.faults.live_job import started, steps_of_attempt, victims
from tests.laws.test_main_job import RECIPE
from trainer.__main__ import main

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Cgroup:
    """A memory cgroup, version 1 or 2."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.first = folder, folder.parent == V1

    def hold(self, pid: int) -> None:
        """Count here what the process takes from now on."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def no_more(self) -> None:
        """From now on nothing more than it uses."""
        used = int((self.folder / ("memory.usage_in_bytes" if self.first else "memory.current")).read_text())
        (self.folder / ("memory.limit_in_bytes" if self.first else "memory.max")).write_text(str(max(used, 1 << 20)))

    def kills(self) -> int:
        """Processes that the kernel has killed for it."""
        text = (self.folder / ("memory.oom_control" if self.first else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    parent = V1 if V1.is_dir() else V2
    folder = parent / f"trilevel-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        if not any((folder / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
            pytest.skip(f"{parent}: no memory controller")
        yield Cgroup(folder)
    finally:
        with contextlib.suppress(OSError):
            for pid in (folder / "cgroup.procs").read_text().split():
                (parent / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            folder.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_starts_again(cgroup: Cgroup, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    run, process = tmp_path / "runs" / "job", started(tmp_path)
    try:
        wait_for(
            lambda: process.poll() is not None or ((run / "journal.jsonl").is_file() and steps_of_attempt(run)[1] >= 3), 300
        )
        (rank,) = victims(process, "rank 1")
        cgroup.hold(rank.pid)
        end = time.monotonic() + 300
        while not cgroup.kills() and process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):  # busy: it just took more
                cgroup.no_more()
            time.sleep(0.2)
        assert cgroup.kills() == 1, "the kernel did it"
        assert process.wait(600) == 0, (tmp_path / "out.txt").read_text()[-4000:]
    finally:
        process.terminate()
    assert len(lines(run, "start")) == 2 and lines(run, "end")[-1]["status"] in ("finished", "stopped")
    assert main(["audit", str(run), "--json", os.devnull]) == 0
    output = (tmp_path / "out.txt").read_text()
    assert "SIGKILL" in output or "-9" in output, output[-3000:]
