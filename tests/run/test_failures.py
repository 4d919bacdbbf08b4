"""The cause of a failure stands where it is looked for, whichever rank had it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, lines, torchrun
from tests.laws.test_main_job import RECIPE


@pytest.mark.dist
def test_the_cause_on_another_rank_is_in_the_journal_on_the_console_and_in_its_log(digits: Path, tmp_path: Path) -> None:
    """Rank 0 itself fails only because its peer is gone ("Connection closed by peer"): that used to be all that the journal had."""
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    script = str(ROOT / "tests" / "support" / "jobs" / "failing_rank.py")
    command = [sys.executable, *torchrun(2), script, "train", str(tmp_path / "job.yaml"), "tracking.to=journal"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    run, cause = tmp_path / "runs" / "job", "rank 1: OSError: the disk of this node is gone"
    (end,) = lines(run, "end")
    assert end["status"] == "failed" and end["reason"].startswith(f"{cause}; then rank 0: ")
    assert f"trilevel: {cause}\n  The run failed there first" in done.stderr
    log = (run / "logs" / "rank-1.txt").read_text()
    assert (
        "trilevel ERROR failed at step" in log and "failing_rank.py" in log and "OSError: the disk of this node is gone" in log
    )


@pytest.mark.dist
def test_a_killed_rank_is_named_by_the_rank_whose_connection_it_closed(digits: Path, tmp_path: Path) -> None:
    """The journal's cause was "rank 0: RuntimeError: [...gloo...] Connection reset by peer", which names no rank."""
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    script = str(ROOT / "tests" / "support" / "jobs" / "failing_rank.py")
    command = [
        sys.executable,
        *torchrun(2),
        script,
        "train",
        str(tmp_path / "job.yaml"),
        "tracking.to=journal",
        "engine.kind=ddp",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment(KILLED="1"), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    (end,) = lines(tmp_path / "runs" / "job", "end")
    assert re.match(r"rank 1 on \S+: its process \d+ (was killed by SIGKILL|has ended)", end["reason"]), end
    assert "; then rank 0: RuntimeError" in end["reason"] and "trilevel: rank 1 on" in done.stderr
