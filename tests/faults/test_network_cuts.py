"""The network between two hosts is cut: a cut that heals in time costs only its time, a longer one ends the job by name on both hosts.

Two network namespaces with an sshd each, under `launch hosts`; the cable of the second one is pulled at the switch.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import lines, wait_for
from tests.launch.test_hosts_real import chains, ended, launch, settings, steps
from tests.support.network_namespaces import Hosts, hosts
from trainer.__main__ import main

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
HEALS, LIMIT = 8.0, 15  # s: a cut that heals; engine.timeout


def cable(made: Hosts, host: int, state: str) -> None:
    subprocess.run(["ip", "-n", made.login, "link", "set", f"port{host}", state], check=True, capture_output=True)


def test_a_cut_that_heals_costs_only_its_time(digits: Path, tmp_path: Path) -> None:
    with hosts(2, tmp_path) as made:
        process = launch(made, *settings(digits, "stop_at=20step", "engine.timeout=120"))
        wait_for(lambda: steps(process, made, "quickstart") >= 4, 400)
        cable(made, 1, "down")
        before = steps(process, made, "quickstart")
        time.sleep(HEALS)
        assert steps(process, made, "quickstart") <= before + 1, "no step without the other host"
        cable(made, 1, "up")
        output = ended(process, made)
        assert process.returncode == 0, output
        run = tmp_path / "runs" / "quickstart"
        assert len(lines(run, "start")) == 1 and max(chains(run)) == 20
        assert max(line["seconds"] for line in lines(run, "step")) > HEALS / 2
    assert main(["audit", str(run)]) == 0


def test_a_longer_cut_ends_the_job_by_name_and_a_resume_continues(digits: Path, tmp_path: Path) -> None:
    words = settings(digits, "checkpoint.every=2step", f"engine.timeout={LIMIT}")
    with hosts(2, tmp_path) as made:
        process = launch(made, *words)
        wait_for(lambda: steps(process, made, "quickstart") >= 5, 400)
        cable(made, 1, "down")
        wait_for(lambda: not made.running(0, "trainer"), 30 * LIMIT)
        wait_for(lambda: not made.running(1, "trainer"), 30 * LIMIT)  # it can be reached by none, and ends by itself
        cable(made, 1, "up")
        output = ended(process, made)
        assert process.returncode not in (0, 75), output
        run = tmp_path / "runs" / "quickstart"
        (end,) = lines(run, "end")
        assert end["status"] == "failed" and "rank 1" in end["reason"] and f"engine.timeout={LIMIT}" in end["reason"], end
        reached = max(chains(run))
        process = launch(made, *words, f"stop_at={reached + 2}step", "--resume")
        output = ended(process, made)
        assert process.returncode == 0, output
        assert 0 < lines(run, "resume")[0]["step"] <= reached and max(chains(run)) == reached + 2
    assert main(["audit", str(run)]) == 0
