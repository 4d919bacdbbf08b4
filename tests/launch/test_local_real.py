"""`launch local` and plain torchrun around the real trainer: a signal to the launcher, a rank that dies; nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, environment, lines, wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1200)]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def begun(folder: Path, digits: Path, *launcher: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run of two processes that makes steps, and its ranks."""
    data = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar", "data.workers=0"]
    words = [*launcher, CONFIG, *data, "log_every=1step", "control=0", "tracking.to=journal"]
    with (folder / "out.txt").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
    journal = folder / "runs" / "quickstart" / "journal.jsonl"

    def stepping() -> bool:
        assert process.poll() is None, (folder / "out.txt").read_text()
        return journal.is_file() and '"kind":"step"' in journal.read_text()

    wait_for(stepping, 600)
    below = psutil.Process(process.pid).children(recursive=True)
    ranks = [one for one in below if one.environ().get("RANK") in ("0", "1")]
    assert len(ranks) >= 2
    return process, [one for one in ranks if "trainer" in one.cmdline()]


def ended(process: subprocess.Popen[str], ranks: list[psutil.Process]) -> int:
    code = process.wait(400)
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in ranks), 60)
    return code


LOCAL = ("launch", "local")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "trainer", "train")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_saves_and_ends_with_75(digits, tmp_path, number):
    process, ranks = begun(tmp_path, digits, *LOCAL)
    process.send_signal(number)
    assert ended(process, ranks) == 75, (tmp_path / "out.txt").read_text()
    run = tmp_path / "runs" / "quickstart"
    assert lines(run, "checkpoint")[-1]["step"] == lines(run, "step")[-1]["step"]


def test_a_rank_that_is_killed_ends_all_with_another_code(digits, tmp_path):
    process, ranks = begun(tmp_path, digits, *LOCAL)
    next(one for one in ranks if one.environ()["RANK"] == "1").kill()
    assert ended(process, ranks) not in (0, 75), (tmp_path / "out.txt").read_text()


def test_under_plain_torchrun_ranks_save_and_torchrun_exits_with_1(digits, tmp_path):
    """torchrun has two exit codes; for 75 start with `launch`, or read the journal."""
    process, ranks = begun(tmp_path, digits, *TORCHRUN)
    for one in ranks:
        if one.environ()["RANK"] == "0":
            os.kill(one.pid, signal.SIGUSR1)  # one rank gets it, all agree to end
            break
    assert ended(process, ranks) == 1, (tmp_path / "out.txt").read_text()
    run = tmp_path / "runs" / "quickstart"
    assert lines(run, "checkpoint")[-1]["step"] == lines(run, "step")[-1]["step"]
    assert "exitcode  : 75" in (tmp_path / "out.txt").read_text()
