"""`launch slurm` for real: our own slurmctld and two slurmd run what was rendered, the quickstart recipe over gloo between two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, lines, wait_for
from tests.support.slurm import NODES, Batch, batch

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
STEPS = 60  # enough that a job still trains when the signal arrives
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")


def settings(digits: Path) -> list[str]:
    data = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar", "data.workers=0"]
    return [*data, "log_every=1step", "control=0", "tracking.to=journal", f"stop_at={STEPS}step"]


def submit(made: Batch, *words: str, refused: bool = False) -> str:
    """Number of the job that `launch slurm` has submitted."""
    command = [sys.executable, "-m", "launch", "slurm", CONFIG, *words, "--setup", "export GLOO_SOCKET_IFNAME=lo"]
    done = subprocess.run(command, cwd=made.folder, env=made.env(), capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode != 0) == refused, done.stdout + done.stderr
    return done.stdout.split()[-1] if not refused else done.stderr


def output(made: Batch, job: str) -> str:
    path = made.folder / f"slurm-{job}.txt"
    return (path.read_text() if path.is_file() else "no output\n") + made.ask("scontrol", "show", "job", job) + made.reported()


def stepping(made: Batch, job: str, attempt: int = 0) -> bool:
    assert made.state(job) not in OVER, output(made, job)
    journal = made.folder / "runs" / "quickstart" / "journal.jsonl"
    rows = [json.loads(row) for row in journal.read_text().splitlines()[:-1]] if journal.is_file() else []
    return any(row["kind"] == "step" and row["attempt"] == attempt for row in rows)


def whole(made: Batch, job: str, digits: Path, worlds: Sequence[int] = (2, 2)) -> None:
    """The job has ended well, over attempts with so many processes, and saw what one process sees."""
    wait_for(lambda: made.state(job) in OVER, 600)
    assert made.state(job) == "COMPLETED", output(made, job)
    run = made.folder / "runs" / "quickstart"
    assert [line["world"] for line in lines(run, "start")] == [*worlds] and lines(run, "resume")[0]["step"] > 0
    assert [line["step"] for line in lines(run, "step")] == list(range(1, STEPS + 1))
    audit = [sys.executable, "-m", "trainer", "audit", str(run), "--json", str(made.folder / "audit.json")]
    subprocess.run(audit, cwd=made.folder, env=environment(), check=True, capture_output=True, timeout=300)
    found = json.loads((made.folder / "audit.json").read_text())  # made again by one process
    assert found["equal"] and found["chain"] == lines(run, "step")[-1]["chain"]


def test_a_typo_is_refused_before_the_queue_and_a_job_of_two_nodes_trains(digits, tmp_path):
    with batch(tmp_path) as made:
        assert "did you mean" in submit(made, "--nodes", "2", "optim.lrr=1", refused=True)
        assert made.ask("squeue", "-h") == ""

        short = ["epochs=1", "optim.warmup=0ep", "stop_at=1ep", "plan.warmup=0ep", "plan.length=1ep", "examples.method=all"]
        job = submit(made, *settings(digits), *short, "--nodes", "2", "--cpus", "1")
        wait_for(lambda: made.state(job) in OVER, 600)
        assert made.state(job) == "COMPLETED", output(made, job)
        run = tmp_path / "runs" / "quickstart"
        assert [(line["world"], line["launcher"]) for line in lines(run, "start")] == [(2, "slurm")]
        assert lines(run, "end")[0]["status"] == "finished" and len(lines(run, "step")) > 10
        assert "\n[rank 0] quickstart  epoch" in (tmp_path / f"slurm-{job}.txt").read_text()


@pytest.mark.slow
def test_a_stopped_job_is_requeued_and_continues(digits, tmp_path):
    with batch(tmp_path) as made:
        job = submit(made, *settings(digits), "--nodes", "2", "--time", "30", "--signal", "60", "--cpus", "1")
        wait_for(lambda: stepping(made, job), 600)
        made.ask("scancel", "--signal=USR1", job)  # what Slurm does --signal seconds before the limit
        whole(made, job, digits)
        message = (tmp_path / "logs" / "quickstart" / "rank-0.txt").read_text()
        assert message.count("-- 20") == 2 and "\nquickstart  epoch" in message  # both attempts


@pytest.mark.slow
def test_a_job_that_the_administrator_requeues_continues(digits, tmp_path):
    """SIGTERM to every process of the job, launchers too, and the end KillWait seconds later."""
    with batch(tmp_path) as made:
        job = submit(made, *settings(digits), "checkpoint.every=5step", "--nodes", "2", "--cpus", "1")
        wait_for(lambda: stepping(made, job), 600)
        wait_for(lambda: (tmp_path / "runs" / "quickstart" / "checkpoints" / "latest").exists(), 300)
        made.ask("scontrol", "requeue", job)
        whole(made, job, digits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "lost", "worlds"), [("1:2", 1, [2, 1]), ("1:2", 0, [2, 1]), ("1:2", None, [2, 2]), ("1", 0, [1, 1])]
)
def test_a_job_outlives_a_node(digits, tmp_path, nodes, lost, worlds):
    """Of nodes 1:2 the second is lost: the first continues. The first is lost, and with it the rendezvous and the batch script: the
    other requeues the job. None is lost, but all get the signal to end. A job that is not elastic Slurm itself queues again."""
    with batch(tmp_path) as made:
        job = submit(made, *settings(digits), "checkpoint.every=5step", "--nodes", nodes, "--cpus", "1")
        wait_for(lambda: stepping(made, job), 600)
        wait_for(lambda: (tmp_path / "runs" / "quickstart" / "checkpoints" / "latest").exists(), 300)
        if lost is None:
            made.ask("scancel", "--signal=USR1", job)
        else:
            made.lose(NODES[lost])
        whole(made, job, digits, worlds)


@pytest.mark.slow
def test_a_sweep_is_an_array_that_is_submitted_again_for_what_is_left(digits, tmp_path):
    with batch(tmp_path) as made:
        small = [
            "epochs=1",
            "optim.warmup=0.5ep",
            "plan.warmup=0ep",
            "plan.length=1ep",
            "examples.method=all",
        ]
        words = [*settings(digits)[:-1], *small, "--seeds", "0,1", "--nodes", "2", "--cpus", "1", "--at-once", "1"]
        command = [
            sys.executable,
            "-m",
            "launch",
            "sweep",
            CONFIG,
            *words,
            "--slurm",
            "--setup",
            "export GLOO_SOCKET_IFNAME=lo",
        ]

        def sweep() -> str:
            done = subprocess.run(
                command, cwd=tmp_path, env=made.env(), capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        job = sweep().split()[-1]
        wait_for(lambda: made.ask("squeue", "-h", "-j", job).strip() == "", 900)
        runs = [tmp_path / "runs" / f"sweep-quickstart-seed{seed}" for seed in (0, 1)]
        for run in runs:
            assert (run / "journal.jsonl").is_file(), (
                "".join(path.read_text() for path in tmp_path.glob("slurm-*.txt")) + made.reported()
            )
            assert lines(run, "end")[-1]["status"] == "finished" and lines(run, "start")[0]["world"] == 2
        message = sweep()
        assert message.count("finished") == 2 and f"trilevel compare {runs[0].relative_to(tmp_path)}" in message
        assert made.ask("squeue", "-h").strip() == ""


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_requeued_and_continues(digits, tmp_path):
    """Slurm itself sends the signal, two or three minutes after the start; the job needs more than that."""
    with batch(tmp_path) as made:
        words = [*settings(digits)[:-1], "epochs=400"]
        job = submit(made, *words, "--nodes", "1", "--processes", "2", "--time", "4", "--signal", "60")
        wait_for(lambda: stepping(made, job, attempt=1), 900)
        made.ask("scancel", job)
        first = lines(tmp_path / "runs" / "quickstart", "end")[0]
        assert first["status"] != "finished" and lines(tmp_path / "runs" / "quickstart", "resume")[0]["step"] > 0
