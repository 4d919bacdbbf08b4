"""`launch hosts` and `doctor --hosts` for real: namespaces with an sshd each, the quickstart recipe over gloo between them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, lines, wait_for
from tests.support.network_namespaces import Hosts, hosts

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
STEPS = 6


def settings(digits: Path, *more: str) -> list[str]:
    data = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar", "data.workers=0"]
    return [*data, "log_every=1step", "control=0", "tracking.to=journal", *more]


def chains(run: Path) -> dict[int, str]:
    return {line["step"]: line["chain"] for line in lines(run, "step")}


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Heads of the hash chain by step, of one uninterrupted process."""
    folder = tmp_path_factory.mktemp("alone")
    words = [sys.executable, "-m", "trainer", "train", CONFIG, *settings(digits, f"stop_at={STEPS}step")]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return chains(folder / "runs" / "quickstart")


def launch(made: Hosts, *words: str) -> subprocess.Popen[str]:
    reported = ["--hostfile", str(made.hostfile()), "--ssh-config", str(made.ssh_config)]
    with (made.folder / "out.txt").open("w") as out:
        return subprocess.Popen(
            made.command(sys.executable, "-m", "launch", "hosts", CONFIG, *words, *reported),
            cwd=made.folder, env=made.env(), stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip


def ended(process: subprocess.Popen[str], made: Hosts) -> str:
    """Its output, once it has ended; nothing of the job may be left on any host."""
    process.wait(560)
    for host in range(len(made.names)):
        wait_for(lambda host=host: not made.running(host, "trainer") and not made.running(host, "launch"), 60)
    return (made.folder / "out.txt").read_text()


def steps(process: subprocess.Popen[str], made: Hosts, run: str) -> int:
    """Steps made so far; fails at once where the job has ended instead."""
    assert process.poll() is None, (made.folder / "out.txt").read_text()
    journal = made.folder / "runs" / run / "journal.jsonl"
    return journal.read_text().count('"kind":"step"') if journal.is_file() else 0


def test_two_hosts_see_what_one_process_sees_and_a_ctrl_c_ends_both(digits, alone, tmp_path):
    with hosts(2, tmp_path) as made:
        process = launch(made, *settings(digits))
        wait_for(lambda: steps(process, made, "quickstart") >= STEPS, 400)
        assert [len(made.running(host, "trainer")) > 0 for host in (0, 1)] == [True, True]
        process.send_signal(signal.SIGINT)
        output = ended(process, made)
        assert process.returncode == 75, output
        run = tmp_path / "runs" / "quickstart"
        assert lines(run, "start")[0]["world"] == 2 and (run / "checkpoints" / "latest").is_file()
        seen = chains(run)
        assert {step: seen[step] for step in alone} == alone
        # each line is marked with its origin, and kept by host and by rank
        logs = tmp_path / "logs" / "quickstart"
        assert (
            "[10.77.13.1] [rank 0] quickstart  epoch" in output
            and "[rank 0] quickstart" in (logs / "10.77.13.1.txt").read_text()
        )
        assert "\nquickstart  epoch" in (logs / "rank-0.txt").read_text() and "[10.77.13.2] [rank 1] " in output
        assert (logs / "rank-1.txt").stat().st_size and "quickstart  epoch" not in (logs / "rank-1.txt").read_text()


@pytest.mark.slow
def test_the_death_of_one_rank_ends_all_hosts_and_the_checkpoint_continues_on_four(digits, alone, tmp_path):
    with hosts(2, tmp_path) as made:
        process = launch(made, *settings(digits, "checkpoint.every=2step"))
        wait_for(lambda: steps(process, made, "quickstart") >= 4, 400)
        for one in made.running(1, "trainer"):
            if "accelerate.commands.launch" not in one.cmdline():  # the launcher names the trainer too
                one.kill()
        output = ended(process, made)
        assert process.returncode not in (0, 75) and "ended with" in output, output
        assert "SIGKILL" in (tmp_path / "logs" / "quickstart" / "10.77.13.2.txt").read_text()
        before = max(chains(tmp_path / "runs" / "quickstart"))
    with hosts(4, tmp_path) as made:
        process = launch(made, *settings(digits, f"stop_at={max(STEPS, before + 1)}step"), "--resume")
        output = ended(process, made)
        assert process.returncode == 0, output
        run = tmp_path / "runs" / "quickstart"
        seen = chains(run)
        assert {step: seen[step] for step in alone} == alone
        assert [line["world"] for line in lines(run, "start")] == [2, 4] and 0 < lines(run, "resume")[0]["step"] <= before


@pytest.mark.slow
def test_of_two_elastic_hosts_one_is_lost_and_the_other_continues(digits, alone, tmp_path):
    with hosts(2, tmp_path) as made:
        process = launch(made, *settings(digits, "checkpoint.every=2step", "stop_at=60step"), "--nodes", "1:2")
        wait_for(lambda: steps(process, made, "quickstart") >= 5, 600)
        for one in made.running(1):  # the host is gone, with all that was on it
            one.kill()
        output = ended(process, made)
        assert process.returncode == 0 and "the other nodes continue without it" in output, output
        run = tmp_path / "runs" / "quickstart"
        seen = chains(run)
        assert [line["world"] for line in lines(run, "start")] == [2, 1] and lines(run, "resume")[0]["step"] >= 4
        assert {step: seen[step] for step in alone} == alone and max(seen) == 60


@pytest.mark.slow
def test_a_host_that_loses_its_power_is_replaced_by_the_spare_without_a_person(digits, alone, tmp_path):
    """The rank of the other host waits in a collective for it, and `engine.timeout` is far away."""
    with hosts(3, tmp_path) as made:
        words = [*settings(digits, "checkpoint.every=2step", "stop_at=12step"), "--nodes", "2", "--resume"]
        process = launch(made, *words)
        wait_for(lambda: steps(process, made, "quickstart") >= 5, 400)
        subprocess.run(["ip", "-n", made.login, "link", "set", "port1", "down"], check=True)
        for one in made.running(1):
            one.kill()
        output = ended(process, made)
        assert process.returncode == 0, output
        assert "10.77.13.2 is left out" in output and "attempt 2 starts in 10 s" in output, output
        run = tmp_path / "runs" / "quickstart"
        assert [line["world"] for line in lines(run, "start")] == [2, 2] and lines(run, "resume")[0]["step"] >= 4
        seen = chains(run)
        assert {step: seen[step] for step in alone} == alone and max(seen) == 12


@pytest.mark.slow  # its parts are in tests/preflight/test_doctor.py
def test_doctor_reports_what_each_host_lacks(tmp_path):
    """The second host cannot reach the third, which the first does not notice; then its link is cut and no interface is set: each fault
    is named, with a remedy."""
    with hosts(3, tmp_path) as made:
        words = ["-m", "trainer", "doctor", "--hosts", str(made.hostfile()), "--ssh-config", str(made.ssh_config)]

        def reported(**more: str) -> dict[str, str]:
            done = subprocess.run(
                made.command(sys.executable, *words), cwd=tmp_path, env=made.env() | more, capture_output=True, text=True,
                timeout=300, check=False,
            )  # fmt: skip
            return {row[5:].split()[0]: row for row in done.stdout.splitlines() if row[5:].strip()}

        subprocess.run(["ip", "-n", made.names[1], "route", "add", "unreachable", "10.77.13.3"], check=True)
        rows = reported()
        assert rows["10.77.13.1"].startswith("ok") and rows["10.77.13.2"].startswith("ok"), rows
        assert rows["ports"].startswith("fail") and "all TCP ports between the hosts" in rows["ports"], rows
        for pair in ("10.77.13.2 can't reach 10.77.13.3 (", "10.77.13.3 can't reach 10.77.13.2 ("):
            assert pair in rows["ports"] and rows["ports"].count("can't reach") == 2, rows
        subprocess.run(["ip", "-n", made.login, "link", "set", "port1", "down"], check=True)
        rows = reported(GLOO_SOCKET_IFNAME="")
        assert rows["10.77.13.1"].startswith("fail") and "GLOO_SOCKET_IFNAME=INTERFACE" in rows["10.77.13.1"], rows
        assert rows["10.77.13.2"].startswith("fail") and "ssh -o BatchMode=yes" in rows["10.77.13.2"], rows
        assert "connectivity to 10.77.13.2 was not tested" in rows["ports"], rows
