"""A failed run starts again without a person as long as its checkpoints advance, and the messages name cause, attempt and command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch import restarts, slurm
from launch.job import BUSY, REFUSED, STOPPED, Job, Nodes
from launch.restarts import NotReadyError, Restarts, repeated, run_directory
from launch.run_files import newest, written_since, written_until_now
from tests.conftest import wait_for
from tests.support import fake_trainer
from tests.support.fake_trainer import launched

folder = fake_trainer.folder  # the fixture
STOPPED_BY_A_PERSON = -1


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "WAITS", (0.0,))


def saved(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08}")


def begun(run: Path) -> None:
    """The first line of an attempt."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "journal.jsonl").open("a") as file:
        file.write('{"kind":"start","time":1.0}\n')


def attempts(run: Path, ends: list[tuple[int, int]], most: int = 3) -> tuple[int, int]:
    """Runs with these ends, (exit code, step of the newest checkpoint); the exit code of all, and how many were started. An attempt with a
    checkpoint has begun."""
    left = list(ends)

    def attempt(received: list[int]) -> int:
        code, step = left.pop(0)
        if step:
            begun(run)
        if step:
            saved(run, step)
        if code == STOPPED_BY_A_PERSON:
            received.append(signal.SIGINT)
        return 1 if code == STOPPED_BY_A_PERSON else code

    return repeated(lambda: attempt, Restarts(run, most, ["local", "c.yaml", "--resume"])), len(ends) - len(left)


@pytest.mark.parametrize(
    ("ends", "code", "started"),
    [
        ([(0, 9)], 0, 1),
        ([(1, 1), (1, 2), (1, 3), (1, 4), (76, 5), (0, 9)], 0, 6),  # every failure after a new checkpoint
        ([(1, 5), (1, 5), (1, 5), (0, 9)], 1, 3),  # three failures from one checkpoint
        ([(1, 0), (1, 0), (1, 0), (0, 9)], 1, 3),  # none was ever saved
        ([(1, 5), (1, 5), (1, 6), (1, 6), (0, 9)], 0, 5),  # progress sets the count back
        ([(STOPPED, 5), (0, 9)], 0, 2),  # a rank or a node got SIGTERM, this launcher none
        ([(STOPPED_BY_A_PERSON, 5), (0, 9)], 1, 1),
        ([(REFUSED, 0), (0, 9)], REFUSED, 1),  # a wrong setting is wrong the next time too
        ([(REFUSED, 5), (0, 9)], 0, 2),  # a store that was gone for a while
        ([(1, 5), (REFUSED, 5), (0, 9)], 0, 3),  # a stuck worker before the first new checkpoint of an attempt
        ([(BUSY, 5), (0, 9)], BUSY, 1),  # another launcher's run, whose checkpoints advance
        ([(1, 5), (BUSY, 0), (0, 9)], 0, 3),  # a rank of the attempt before, on a node that did not answer
    ],
)
def test_restarts_as_long_as_checkpoints_advance(ends: list[tuple[int, int]], code: int, started: int, tmp_path: Path) -> None:
    assert attempts(tmp_path, ends) == (code, started)


@pytest.mark.parametrize("in_the_attempt", [False, True])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(
    in_the_attempt: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(restarts, "GONE", 0.0)
    monkeypatch.setattr(restarts, "LOOK", 0.01)
    started: list[str] = []

    def attempt(received: list[int]) -> int:
        started.append(newest(run))
        if not in_the_attempt and len(started) == 1:
            saved(run, 5)
            return 1
        saved(run, 5)
        time.sleep(0.5)  # looked at meanwhile
        run.rename(tmp_path / "elsewhere")
        return 1

    assert repeated(lambda: attempt, Restarts(run, 3, ["local", "c.yaml", "--resume"])) == 1
    assert started == ([""] if in_the_attempt else ["", "step-00000005"])
    output = capsys.readouterr().err
    assert f"{run}/checkpoints is gone since step-00000005" in output and output.endswith("local c.yaml --resume\n")


def test_a_run_directory_that_comes_back_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    saved(run, 5)
    monkeypatch.setattr(restarts, "pause", lambda _: run.exists() or (tmp_path / "elsewhere").rename(run))
    ends = [lambda: run.rename(tmp_path / "elsewhere") and 1, lambda: 0]
    assert repeated(lambda: lambda _: ends.pop(0)(), Restarts(run, 3, ["local", "c.yaml", "--resume"])) == 0 and not ends
    assert newest(run) == "step-00000005"


def test_nodes_that_fail_their_check_are_waited_for_and_count_as_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(restarts, "pause", waited.append)
    answers: list[str] = ["", *["node1: no answer"] * 20, "", ""]
    ends = [1, 0]

    def prepare() -> Any:
        if why := answers.pop(0):
            raise NotReadyError(why)
        return lambda received: ends.pop(0)

    saved(tmp_path, 5)
    assert repeated(prepare, Restarts(tmp_path, 2, ["hosts", "c.yaml", "--resume"])) == 0
    assert (
        waited == [0.0, *[restarts.ASK] * 20] and capsys.readouterr().err.count("node1: no answer; asked again every 60 s") == 1
    )
    answers[:] = ["node1: no answer"]
    assert repeated(prepare, Restarts(tmp_path, 2, ["hosts", "c.yaml", "--resume"])) == 1, (
        "the first attempt ends at once: a person is there"
    )
    assert capsys.readouterr().err == "launch: node1: no answer. After a repair: python -m launch hosts c.yaml --resume\n"


def test_waits_grow_with_the_failures_from_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of no_wait
    found = Restarts(tmp_path, 9, ["local"])
    seconds = []
    for step in (1, 1, 1, 1, 1, 2, 2):
        saved(tmp_path, step)
        found.begin()
        seconds.append(found.again(1))
    assert seconds == [10, 60, 300, 900, 900, 10, 60]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, STOPPED), (signal.SIGTERM, STOPPED), (signal.SIGINT, 130)])
def test_a_signal_between_two_attempts_ends_the_launcher_by_its_code(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "WAITS", (60.0,))
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    before = signal.getsignal(number)
    assert repeated(lambda: lambda _: 1, Restarts(tmp_path, 3, ["local"])) == code and signal.getsignal(number) == before


def test_only_lines_of_the_attempt_count_whatever_the_clocks_are(tmp_path: Path) -> None:
    begun(tmp_path)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind":"end","time":9e9,"reason":"of the attempt before"}\n{"kind":"st')
    offset = written_until_now(tmp_path)
    assert written_since(tmp_path, offset) == (False, "", None)
    (tmp_path / "journal.jsonl").write_bytes((tmp_path / "journal.jsonl").read_bytes()[:offset])  # the torn line is removed
    begun(tmp_path)
    assert written_since(tmp_path, offset) == (True, "", None)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind":"end","time":1.0,"reason":"this one"}\n')
    assert written_since(tmp_path, offset) == (True, "this one", None) and written_until_now(tmp_path / "nowhere") == 0


def test_messages_name_cause_attempt_checkpoint_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 5)
    found = Restarts(tmp_path, 2, ["local", "c.yaml", "name=a b", "--resume"])
    begun(tmp_path)
    found.begin()
    end = {"kind": "end", "time": time.time(), "status": "failed", "reason": "rank 1: OSError: the disk of this node is gone"}
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(json.dumps(end) + "\n")
    assert found.again(76) == 0.0
    first = capsys.readouterr().err
    assert "launch: attempt 1 ended with 76 (a rank did not arrive): rank 1: OSError: the disk of this node is gone\n" in first
    assert "newest checkpoint: step-00000005, failure 1 of 2 from there; attempt 2 starts in" in first
    found.begin()
    assert found.again(1) is None
    last = capsys.readouterr().err
    assert "attempt 2 ended with 1: its journal has no last line: killed, or node lost" in last, "not the cause of attempt 1"
    assert "2 failures from there, so it is not repeated (--restarts 2)" in last
    assert last.endswith("After a repair: python -m launch local c.yaml 'name=a b' --resume\n")


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [("finished", "", 0), ("stopped", "stop_at=3step", 0), ("stopped", "preempted", 75), ("failed", "", 76)],
)
def test_an_attempt_that_had_saved_all_is_not_failed_by_a_process_that_ends_badly(
    status: str, reason: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank stopped after the last line gave 76, and the reason of the good end as the cause."""

    def attempt(_received: list[int]) -> int:
        begun(tmp_path)
        with (tmp_path / "journal.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "end", "time": time.time(), "status": status, "reason": reason}) + "\n")
        return 76

    assert repeated(lambda: attempt, Restarts(tmp_path, 0, ["local"])) == code
    message = capsys.readouterr().err
    assert (
        f"attempt 1 had saved all when a process failed, was stopped or killed (76 (a rank did not arrive)); exit code {code}"
        in message
    ) == (code != 76)


@pytest.mark.parametrize("code", [2, 73])
def test_a_refused_attempt_stays_refused_beside_a_process_that_finishes(code: int, tmp_path: Path) -> None:
    """The last line is that of the other process, which trains this run."""
    found = Restarts(tmp_path, 0, ["local"])
    begun(tmp_path)
    found.begin()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "end", "time": time.time(), "status": "finished", "reason": ""}) + "\n")
    assert found.settled(code) == code and found.settled(76) == 0


def test_without_resume_nothing_is_repeated_and_the_command_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 5)
    assert attempts(tmp_path, [(1, 6), (0, 9)], most=0) == (1, 1)
    assert attempts(tmp_path, [(STOPPED, 6), (0, 9)], most=0) == (STOPPED, 1)
    shown = capsys.readouterr().err
    assert shown.endswith(f"not repeated. Logs: {tmp_path}/logs. After a repair: python -m launch local c.yaml --resume\n")


def test_the_run_directory_is_that_of_the_trainer(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: x\nruns: elsewhere\n")
    file = str(tmp_path / "c.yaml")
    assert run_directory(Job(file)) == Path("elsewhere/x")
    assert run_directory(Job(file, ("name=y", "runs=here", "name=z"))) == Path("here/z")


@pytest.mark.dist
def test_local_starts_a_crashing_run_again_only_with_resume(folder: Path) -> None:
    process = launched(folder, "crash=1", "--processes", "2", "--resume", "--restarts", "2")
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1
    assert output.count("failure 1 of 2 from there; attempt 2 starts") == 1 and "attempt 2 ended with 1" in output


@pytest.mark.dist
def test_a_signal_ends_a_run_that_would_be_repeated(folder: Path) -> None:
    process = launched(folder, "wait=1", "--processes", "2", "--resume")
    wait_for(lambda: all((folder / f"{rank}.json").exists() for rank in (0, 1)))  # a signal before that kills a rank
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 75 and "starts in" not in output


def slurm_script(tmp_path: Path) -> str:
    stands_in = ("set -eu", "SLURM_JOB_ID=7 SLURM_JOB_NODELIST=a", 'srun() { return "$CODE"; }', 'scontrol() { echo "$@"; }')
    return slurm.render(Job("c.yaml"), slurm.SlurmRequest(Nodes(1, 1), 1, setup=stands_in), "python", "runs/a b")


def test_a_failed_slurm_job_is_requeued_as_long_as_checkpoints_advance(tmp_path: Path) -> None:
    text = slurm_script(tmp_path)

    def ended(code: int, step: int, number: int = 1) -> str:
        if step:
            saved(tmp_path / "runs" / "a b", step)
        env = {"CODE": str(code), "PATH": "/bin:/usr/bin", "SLURM_RESTART_COUNT": str(number)}
        done = subprocess.run(["bash"], input=text, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == code, done.stderr
        return done.stdout

    for step in (0, 1, 2, 3, 3):
        assert ended(1, step).endswith("requeue 7\n"), step
    last = ended(1, 3)
    assert "newest checkpoint: step-00000003, 3 of 3 ends there; not requeued" in last and "requeue 7" not in last
    assert "by the same command with --resume" in last
    assert [ended(75, 3).endswith("requeue 7\n") for _ in range(3)] == [True, True, False], "stopped before its first step"
    assert "refused; not requeued" in ended(2, 0)
    begins = text.replace(
        'srun() { return "$CODE"; }', 'srun() { echo \'{"kind":"start"}\' >> "$run/journal.jsonl"; return "$CODE"; }'
    )
    done = subprocess.run(
        ["bash"], input=begins, capture_output=True, text=True, cwd=tmp_path, env={"CODE": "2", "PATH": "/bin:/usr/bin"}
    )
    assert done.stdout.endswith("requeue 7\n"), "a stuck worker before the first new checkpoint"
    assert "another process trains this run; not requeued" in ended(73, 0, number=0)
    assert ended(73, 4).endswith("requeue 7\n"), "a rank of the attempt before"
    assert ended(1, 4).endswith("requeue 7\n")
    assert (tmp_path / ".ends-7").is_file()
    assert ended(0, 5) == "" and not (tmp_path / ".ends-7").exists() and not (tmp_path / ".newest-7").exists()


@pytest.mark.parametrize("there", ["before", "made in the attempt", "brought back"])
def test_a_slurm_job_whose_checkpoints_are_gone_is_not_begun_anew(there: str, tmp_path: Path) -> None:
    run, back = tmp_path / "runs" / "a b", there == "brought back"
    save = f'mkdir -p "{run}/checkpoints"; echo step-00000005 > "{run}/checkpoints/latest"'
    leave = f'mv "{run}" "{tmp_path}/elsewhere"' + (f'; (command sleep 1; mv "{tmp_path}/elsewhere" "{run}") &' if back else "")
    looked = "for _ in $(seq 300); do [ ! -e .newest-7 ] || break; command sleep 0.1; done"
    srun = f"srun() {{ {save}; {looked}; {leave}\nreturn 1; }}"
    if there == "before":
        saved(run, 5)
    quick = 'sleep() { command sleep "0.$1"; }'  # 5 s between two looks are .5 s here
    stands_in = ("set -eu", "GONE=20 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=a", quick, srun, 'scontrol() { echo "$@"; }')
    text = slurm.render(Job("c.yaml"), slurm.SlurmRequest(Nodes(1, 1), 1, setup=stands_in), "python", "runs/a b")
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/bin:/usr/bin"})
    assert "checkpoint step-00000005 is gone; waiting 20 s" in done.stdout, done.stderr
    assert ("requeue 7" in done.stdout) == back
    assert ("an attempt would begin the run anew; not requeued" in done.stdout) != back
    if not back:  # requeued by a person, or by a node that outlived the script
        again = text.replace("srun() {", "srun() { echo trains; ")
        done = subprocess.run(
            ["bash"], input=again, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/bin:/usr/bin"}
        )
        assert done.returncode == 1 and "trains" not in done.stdout and "would begin the run anew" in done.stdout, done.stdout
