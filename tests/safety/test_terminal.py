"""A full or closed terminal, pipe or log never ends a run, and the exit code stays that of the run."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from launch import __main__ as launch
from tests.conftest import ROOT, environment, wait_for
from tests.support.journals import lines, write
from trainer.__main__ import main
from trainer.run.console import Console

RECIPE = """
name: job
epochs: 1
stop_at: 4step
log_every: 1step
control: 0.0
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32, args: {patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}}
data: {train: "DIGITS/train-*.tar", validation: "DIGITS/validation-*.tar", batch: 64, micro_batch: 64, workers: 0, lanes: 4}
augment: {crop: none, flip: 0.0}
optim: {lr: 1.0e-3, warmup: 0.5ep}
engine: {kind: ddp, zero: 0, precision: float32}
tracking: {to: journal}
"""


class Broken(io.StringIO):
    """A stream that refuses every write, each time for another reason."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.tried, self._terminal = 0, terminal
        self._reasons = itertools.cycle((errno.ENOSPC, errno.EPIPE, errno.EIO))

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        self.tried += 1
        raise OSError(number := next(self._reasons), os.strerror(number))

    def flush(self) -> None:
        self.write("")


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(RECIPE.replace("DIGITS", str(digits)))
    return path


def test_a_run_continues_when_its_terminal_or_pipe_is_gone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = Broken(), Broken()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = main(["train", str(recipe), f"runs={tmp_path}"])
    monkeypatch.undo()
    assert code == 0 and out.tried > 4
    last = json.loads((tmp_path / "job" / "journal.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["status"], last["step"]) == ("end", "stopped", 4)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_goes_quiet(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Broken(terminal)
    with Console("tri", 4, file=out, terminal=terminal) as console:
        console.message("packed")
        for line in lines():
            if line["kind"] in ("epoch", "eval", "step"):
                getattr(console, line["kind"])(**line)
        console.end("finished", 3, 4.0)
    assert out.tried


def test_an_exit_code_that_has_no_place_is_returned(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.run.recorder import RunResult

    monkeypatch.setenv("TRILEVEL_EXIT_FILE", str(tmp_path / "gone" / "exit"))
    monkeypatch.setattr("trainer.train.train", lambda *_, **__: RunResult("preempted", 0.0, tmp_path))
    assert main(["train", str(recipe)]) == 75


def closed(*words: str, folder: Path, ends: str = ">&- 2>&- <&-", **env: str) -> subprocess.Popen[str]:
    """A command whose standard streams the shell closed."""
    line = f'exec "$@" {ends}'
    return subprocess.Popen(
        ["sh", "-c", line, "sh", sys.executable, "-m", *words], cwd=folder, env=environment(**env), text=True
    )


@pytest.mark.timeout(120)
def test_closed_streams(recipe: Path, tmp_path: Path) -> None:
    run = write(tmp_path / "made", [*lines()])
    endless = ["epochs=1000", "stop_at=100000step", f"runs={tmp_path}"]
    training = closed("trainer", "train", str(recipe), *endless, folder=tmp_path)
    report = closed("trainer", "report", str(run), folder=tmp_path)
    dry = closed("launch", "local", str(recipe), "--dry-run", folder=tmp_path)
    assert report.wait(100) == 0 and (run / "report.png").is_file()
    assert dry.wait(100) == 0
    journal = tmp_path / "job" / "journal.jsonl"
    wait_for(lambda: journal.exists() and '"kind":"step"' in journal.read_text(), 100)
    training.send_signal(signal.SIGTERM)
    assert training.wait(60) == 75
    assert all(line.startswith("{") for line in journal.read_text().splitlines())  # no other stream got its descriptor


def on_terminal(folder: Path, *words: str, before: str = "") -> tuple[subprocess.Popen[bytes], int]:
    """A command whose standard streams are its controlling terminal, and the other end of it. before: what its shell does first."""
    ours, its = os.openpty()

    def take() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    command = ["sh", "-c", f'{before} exec "$@"', "sh", sys.executable, "-m", *words]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdin=its, stdout=its, stderr=its, start_new_session=True,
        preexec_fn=take,
    )  # fmt: skip
    os.close(its)
    return process, ours


@pytest.mark.timeout(300)  # a loaded machine takes a minute for the report at the end
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_in_mid_run(ignored: bool, recipe: Path, tmp_path: Path) -> None:
    """Its SIGHUP saves and ends the run with 75. Where it is ignored, as under nohup, the run continues and only its lines are lost."""
    endless = ["epochs=1000", "stop_at=100000step", "data.workers=1", f"runs={tmp_path}"]
    process, terminal = on_terminal(tmp_path, "trainer", "train", str(recipe), *endless, before="trap '' HUP;" * ignored)
    journal = tmp_path / "job" / "journal.jsonl"

    def steps() -> int:
        return journal.read_text().count('"kind":"step"')

    try:
        while b"loss" not in os.read(terminal, 1 << 16):
            pass
        os.close(terminal)
        if ignored:
            begun = steps()
            wait_for(lambda: steps() > begun + 5)
            process.send_signal(signal.SIGTERM)
        assert process.wait(200) == 75
    finally:
        process.kill()
    last = json.loads(journal.read_text().splitlines()[-1])
    assert (last["kind"], last["status"], last["reason"]) == ("end", "stopped", "preempted")
    assert (tmp_path / "job" / "checkpoints" / "latest").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_result_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    run = write(tmp_path / "made", [*lines()])
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "trainer", "report", str(run)]
        done = subprocess.run(words, cwd=ROOT, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "trilevel: standard output: No space left on device" in done.stderr


def test_a_dry_run_is_a_script_whatever_its_words_hold(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    ran = tmp_path / "RAN"
    assert launch.main(["slurm", str(recipe), f"x=a\n#SBATCH --uid=0\ntouch {ran}\r\n", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n# ")
    head = script.split("\naddress_of()")[0]
    assert not [line for line in head.splitlines() if line.startswith(("#SBATCH --uid", "touch"))]
    subprocess.run(
        ["bash"], input=script, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert not ran.exists()
