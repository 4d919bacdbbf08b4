"""Worker processes: signals from birth on, a worker that stands still, and no fork beside other threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from tests.conftest import ROOT, environment, lines, torchrun
from tests.laws.test_main_job import RECIPE
from trainer.data.errors import DataError, WorkerDied
from trainer.data.loader.workers import Loader


class _Some(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.zeros(2) + number


KILLER = "import os, sys\nfor line in sys.stdin:\n  os.kill(int(line), 15)\n"


def test_a_sigterm_to_a_worker_that_is_being_born_does_not_end_it() -> None:
    """As scancel sends it to all processes. With torch's handler in its first moments, 58 of 60 such loaders failed."""
    with subprocess.Popen([sys.executable, "-c", KILLER], stdin=subprocess.PIPE, text=True, bufsize=1) as killer:
        assert killer.stdin is not None
        me, known, over = psutil.Process(), {killer.pid}, threading.Event()
        known |= {child.pid for child in me.children()}

        def hunt() -> None:
            while not over.wait(0.0005):
                for child in me.children():
                    if child.pid not in known:
                        known.add(child.pid)
                        time.sleep(len(known) % 10 / 1000)  # in its first 10 ms
                        killer.stdin.write(f"{child.pid}\n")  # pyright: ignore[reportOptionalMemberAccess]

        hunter, before = threading.Thread(target=hunt, daemon=True), len(known)
        hunter.start()
        for _ in range(10):
            assert len(list(Loader(_Some(), 1))) == 4
        over.set()
        hunter.join()
        assert len(known) - before >= 5, "workers that were sent a signal"
        killer.stdin.close()


def test_a_worker_that_stands_still_ends_the_wait_by_name() -> None:
    loader = Loader(_Some(), 1, timeout=2)
    assert len(list(loader)) == 4
    (worker,) = loader._iterator._workers  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=rf"no batch .* for 2 s \(data.timeout\): process {worker.pid} stopped; .*--resume"):
        list(loader)


def test_a_killed_worker_is_named_with_its_signal_and_a_remedy() -> None:
    """It was a raw stack: "DataLoader worker (pid 4321) is killed by signal: Killed"."""
    loader = Loader(_Some(), 1, timeout=60)
    assert len(list(loader)) == 4
    (worker,) = loader._iterator._workers  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    expected = rf"worker process {worker.pid} of the loader killed by SIGKILL: .* Lower data.workers or data.window, .*--resume"
    with pytest.raises(WorkerDied, match=expected) as caught:
        os.kill(
            worker.pid, signal.SIGKILL
        )  # torch's handler of SIGCHLD raises here, in mid-step, or else the wait for a batch does
        time.sleep(1)
        list(loader)
    assert caught.value.exit_code == 1, "a launcher starts such a run again"


def test_workers_start_without_a_task_and_serve_every_iteration() -> None:
    numbers: list[int] = []
    loader = Loader(_Some(), 2, sampler=numbers)
    loader.fork()
    (first,) = [[worker.pid for worker in loader._iterator._workers]]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    for wanted in ([0, 1, 2, 3], [2], [], [3, 1]):
        numbers[:] = wanted
        assert [int(found[0]) for found in loader] == wanted
    numbers[:] = [0, 1, 2, 3]
    next(iter(loader))  # an iteration that is dropped, as an interrupted evaluation
    assert [int(found[0]) for found in loader] == [0, 1, 2, 3]
    assert first == [worker.pid for worker in loader._iterator._workers]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


@pytest.mark.dist
def test_nothing_forks_once_the_process_group_exists(digits: Path, tmp_path: Path, trilevel: Callable[..., Any]) -> None:
    """Two epochs on two ranks, with dropping, a probe, two evaluations and checkpoints in the background (CPython gh-112275)."""
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    script = ROOT / "tests" / "support" / "jobs" / "no_fork.py"
    words = [
        "examples.rule=probe",
        "examples.probe_share=1.0",
        "evaluate.every=1ep",
        "stop_at=2ep",
        "checkpoint.every=1ep",
        "data.workers=1",
        "control=0",
        "tracking.to=journal",
    ]
    command = [sys.executable, *torchrun(2), str(script), "train", str(tmp_path / "job.yaml"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "forked" not in done.stderr and done.stdout.count("forks before the process group: ") == 2
    assert lines(tmp_path / "runs" / "job", "probe")
    assert len(lines(tmp_path / "runs" / "job", "eval")) == 4, "raw weights and their average, twice"
