"""`python -m launch`: what it renders, what it refuses, and what really happens to the processes it starts."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

import launch.__main__ as program
from launch import arguments, local, machine, processes
from launch.job import Command, Job, LaunchError, check, name_of
from launch.machine import Machine
from launch.processes import start
from tests.conftest import environment, free_port, wait_for
from tests.support import fake_trainer
from tests.support.fake_trainer import TRAINER, launched, read

folder = fake_trainer.folder  # the fixture
RENDERED = Path(__file__).parent / "rendered"
JOB = Job("configs/quickstart.yaml", ("optim.lr=1e-3", "name=a b"))
CASES = {
    "local_cpu": (JOB, Machine(gpus=0, cores=8), None),
    "local_cpu_one": (JOB, Machine(gpus=0, cores=2, threads=3), 1),
    "local_gpus": (JOB, Machine(gpus=8, cores=64), None),
    "local_gpu_one_resumed": (Job("c.yaml", (), True), Machine(gpus=1, cores=64), None),
}


@pytest.mark.parametrize("name", CASES)
def test_rendered_commands_equal_the_stored_text(name):
    job, found, processes = CASES[name]
    node = local.place(found, processes, port=29400)
    text = f"{check(job, node.world, 'python').text()}\n{local.render(job, node, 'python').text()}\n"
    assert text == (RENDERED / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", CASES)
def test_accelerate_understands_what_is_rendered(name):
    from accelerate.commands.launch import launch_command_parser

    job, found, processes = CASES[name]
    node = local.place(found, processes, port=29400)
    words = list(local.render(job, node, "python").argv)
    read = launch_command_parser().parse_args(words[3:])
    assert read.module and read.training_script == "trainer" and tuple(read.training_script_args) == job.train()
    assert read.num_processes == node.world and bool(read.multi_gpu) == (node.world > 1)


def test_a_machine_gives_one_process_per_gpu_or_two_on_cpu():
    places = [local.place(Machine(g, 16), p, 1) for g, p in ((4, None), (4, 2), (0, None), (0, 3))]
    assert [(n.processes, n.gpus, n.threads) for n in places] == [
        (4, True, None),
        (2, True, None),
        (2, False, 8),
        (3, False, 5),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("locl c.yaml", ["'locl'", "did you mean 'local'?"]),
        ("local c.yaml --proceses 2", ["--proceses", "did you mean '--processes'?"]),
        ("local c.yaml --epochs=3", ["--epochs=3", "a setting is written without dashes: epochs=3"]),
        ("local c.yaml --dryrun", ["--dryrun", "--dry-run"]),
        ("local c.yaml lr", ["'lr': not a setting", "optim.lr=1e-3"]),
        ("local c.yaml --processes two", ["--processes", "two"]),
        ("local c.yaml --processes 0", ["--processes 0", "at least 1"]),
        ("local", ["CONFIG", "usage:"]),
        ("", ["COMMAND"]),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is_near(words, message, capsys, monkeypatch):
    monkeypatch.setattr(program, "start", lambda command: pytest.fail("started"))
    assert program.main(words.split()) == 2
    error = capsys.readouterr().err
    for text in message:
        assert text in error


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(LaunchError, match=r"--processes 3: this machine has 2 GPU.*CUDA_VISIBLE_DEVICES="):
        local.place(Machine(2, 8), 3, 1)


def test_the_last_of_two_names_is_the_runs_as_in_the_configuration():
    assert name_of(Job("c/deit.yaml", ("name=first", "optim.lr=1", "name=second"))) == "second"
    assert name_of(Job("c/deit.yaml", ("runs.name=x",))) == "deit"


def test_settings_may_stand_before_and_after_flags():
    found = arguments.parse(["local", "c.yaml", "a=1", "--processes", "2", "b=2", "--dry-run"])
    assert (found.config, found.overrides, found.processes, found.dry_run) == ("c.yaml", ["a=1", "b=2"], 2, True)


def test_gpus_are_counted_as_torch_sees_them(tmp_path, monkeypatch):
    """A machine that lists GPUs which torch can't use is refused: CPU training in its place would be no help."""
    for name, body in {
        "nvidia-smi": 'echo "GPU 0: H (UUID: x)"; echo "  MIG 1g"; echo "GPU 1: H (UUID: y)"',
        "python": "echo 2",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.count_gpus(str(tmp_path / "python")) == 2
    (tmp_path / "python").write_text("#!/bin/sh\necho 0\n")
    with pytest.raises(LaunchError, match=r"2 GPU\(s\) and torch sees none"):
        machine.count_gpus(str(tmp_path / "python"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.count_gpus(str(tmp_path / "python")) == 0


def test_a_refused_configuration_starts_nothing(folder):
    process = launched(folder, "bad=1", "--processes", "3")
    process.communicate(timeout=60)
    assert process.returncode == 2 and not (folder / "0.json").exists()
    assert read(folder / "check.json") == {"words": ["train", "c.yaml", "bad=1", "--check"], "world": "3"}


@pytest.mark.dist
def test_two_processes_get_their_ranks_and_end_by_a_signal_with_their_checkpoint(folder):
    process = launched(folder, "wait=1", "--resume")
    wait_for(lambda: (folder / "0.json").exists() and (folder / "1.json").exists(), 60)
    ranks = [read(folder / f"{rank}.json") for rank in (0, 1)]
    assert all(r["words"] == ["train", "c.yaml", "wait=1", "--resume"] for r in ranks)
    env = [r["env"] for r in ranks]
    assert [(e["RANK"], e["WORLD_SIZE"]) for e in env] == [("0", "2"), ("1", "2")] and env[0]["MASTER_PORT"] == env[1][
        "MASTER_PORT"
    ]
    assert all((e["DS_ACCELERATOR"], e["ACCELERATE_USE_CPU"], e["OMP_NUM_THREADS"]) == ("cpu", "true", "1") for e in env)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    # once each, and loader workers do not get it: torchrun's own reaction to SIGTERM would have killed them
    assert [read(folder / f"{rank}.heard") for rank in (0, 1)] == [{"signals": [signal.SIGTERM], "loader": None}] * 2


@pytest.mark.dist
def test_one_process_gets_ctrl_c_once_too(folder):
    process = launched(folder, "wait=1", "--processes", "1")
    wait_for(lambda: (folder / "0.json").exists(), 60)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the whole foreground group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert read(folder / "0.heard") == {"signals": [signal.SIGINT], "loader": None}


@pytest.mark.dist
def test_a_rank_that_fails_ends_all_and_is_reported(folder):
    process = launched(folder, "crash=1")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output


@pytest.mark.dist
def test_a_third_ctrl_c_kills_everything(folder):
    (folder / "trainer" / "__main__.py").write_text(TRAINER.replace("while not signals and", "while"))
    process = launched(folder, "wait=1")
    wait_for(lambda: (folder / "0.json").exists() and (folder / "1.json").exists(), 60)
    started = time.monotonic()
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - started < 20
    assert not (folder / "0.heard").exists()


@pytest.mark.dist
def test_a_rank_that_is_stopped_while_the_others_exit_is_killed(folder, monkeypatch, capfd):
    """torchrun waits without limit for a rank that got SIGSTOP once the others have ended well."""
    (folder / "trainer" / "__main__.py").write_text(TRAINER + "\nif rank == '1':\n    os.kill(os.getpid(), signal.SIGSTOP)\n")
    monkeypatch.chdir(folder)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ['PYTHONPATH']}")
    monkeypatch.setattr(processes, "LAST", 1.0)
    monkeypatch.setattr(processes, "LOOK", 0.1)  # these ranks live for .5 s
    node = local.place(Machine(gpus=0, cores=2), 2, free_port())
    assert start(local.render(Job("c.yaml"), node, sys.executable)) == 1, "started again with --resume, it would end at once"
    message = capfd.readouterr().err
    assert "launch: 1 rank(s), processes " in message and "still run 1 s after another rank" in message


def test_ranks_are_left_behind_once_others_of_their_start_have_ended(monkeypatch):
    monkeypatch.setattr(processes, "LAST", 0.0)
    left = processes._Left()
    found = [left.behind(ranks) for ranks in ([], [1, 2], [1, 2], [2], [2], [2, 3], [2, 3], [3], [4, 5], [])]
    assert found == [[], [], [], [2], [2], [], [], [3], [], []]
    monkeypatch.setattr(processes, "LAST", 0.2)  # a look that misses a rank once kills none
    assert [left.behind([6, 7]), left.behind([6]), left.behind([6, 7]), time.sleep(0.3), left.behind([6, 7])] == [
        [],
        [],
        [],
        None,
        [],
    ]


@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_of_slurm_that_comes_while_ranks_import_is_not_lost(folder):
    waits = 'pathlib.Path("importing" + rank).touch()\ntime.sleep(12)\nsignals = []'
    (folder / "trainer" / "__main__.py").write_text(TRAINER.replace("signals = []", waits))
    process = launched(folder, "wait=1")
    wait_for(lambda: (folder / "importing0").exists() and (folder / "importing1").exists(), 60)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert signal.SIGUSR1 in read(folder / "1.heard")["signals"]


@pytest.mark.parametrize(("reported", "code", "found"), [("75", 1, 75), ("0", 3, 3), ("", 3, 3), ("75", 0, 75)])
def test_the_exit_code_that_rank_0_reports_goes_before_the_launchers(reported: str, code: int, found: int) -> None:
    """torchrun turns every code into 1: a job that was preempted would not be queued again."""
    assert start(Command(("sh", "-c", f'printf "{reported}" > "$TRILEVEL_EXIT_FILE"; exit {code}'))) == found
