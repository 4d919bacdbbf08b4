"""What is saved is enough: a run stopped anywhere continues as if uninterrupted, and plain timm loads its weights.
Laws 2 and 6 of docs/laws.md."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparsity.types import DENSE, ModelOutput
from tests.conftest import ROOT, environment, free_port, kill, lines, wait_for
from trainer.__main__ import main
from trainer.checkpoint.export import export
from trainer.checkpoint.save_load import CheckpointError
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.data.loader.build import validation_set
from trainer.data.loader.dataset import open_indexes
from trainer.model.evaluate import Scores, evaluate
from trainer.run import shutdown

pytestmark = pytest.mark.dist

RECIPE = """
name: job
epochs: 3
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 16, drop_path: 0.1,
        args: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}}
data: {train: "DIGITS/train-*.tar", validation: "DIGITS/validation-*.tar", batch: 360, micro_batch: 180, workers: 0, lanes: 4,
       window: 256}
augment: {crop: none, flip: 0.0}
optim: {warmup: 1ep, ema: 0.9}
evaluate: {batch: 64}
checkpoint: {every: 5step, keep: 9}
engine: {zero: 1, precision: float32}
tracking: {to: journal}
"""
SCENES = ("training", "evaluating", "writing", "full")


def job(
    folder: Path, digits: Path, world: int, *scenes: str, more: str = "", timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    recipe = RECIPE.replace("DIGITS", str(digits))
    (folder / "job.yaml").write_text(recipe.replace("engine: {", f"engine: {{{more}"))
    words = [str(ROOT / "tests" / "support" / "jobs" / "interrupted_runs.py"), "job.yaml", *scenes]
    run = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(free_port())]
    return subprocess.run(
        [sys.executable, *run, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    done = job(folder, digits, 2, "whole", *SCENES, "zero3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (folder / "reports.txt").write_text(done.stdout)
    return folder


def reported(runs: Path, scene: str) -> list[str]:
    return [
        line.split(": ", 1)[1]
        for line in (runs / "reports.txt").read_text().splitlines()
        if line.startswith(f"reported {scene}: ")
    ]


def seen(run: Path) -> dict[str, Any]:
    """All of a run that must not depend on whether it was interrupted."""
    facts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "step": lambda line: (line["step"], line["loss"], line["chain"]),
        "epoch": lambda line: (line["epoch"], line["facts"]["hash"]),
        "eval": lambda line: (line["step"], line["progress"], line["ema"], line["top1"], line["loss"], line["images"]),
    }
    return {kind: [of(line) for line in lines(run, kind)] for kind, of in facts.items()}


@pytest.mark.parametrize("scene", SCENES)
def test_interrupted_anywhere_is_uninterrupted(runs: Path, scene: str) -> None:
    assert reported(runs, scene)[-1] == "finished"
    assert seen(runs / "runs" / scene) == seen(runs / "runs" / "whole")
    assert {line["attempt"] for line in lines(runs / "runs" / scene, "step")} == {0, 1}


def test_the_run_stops_where_it_was_requested(runs: Path) -> None:
    ends = {scene: lines(runs / "runs" / scene, "end")[0] for scene in SCENES}
    for scene in ("training", "evaluating", "writing"):
        assert reported(runs, scene)[0] == "preempted"
        assert (ends[scene]["status"], ends[scene]["reason"]) == ("stopped", "preempted")
    assert ends["training"]["step"] == 5  # requested in the fifth step
    assert ends["evaluating"]["step"] == 6  # the second epoch's evaluation, interrupted between two batches, to be repeated
    assert [line["attempt"] for line in lines(runs / "runs" / "evaluating", "eval") if line["step"] == 6] == [1, 1]
    assert ends["writing"]["step"] in (6, 7)


def test_a_checkpoint_is_written_during_training_and_awaited_at_the_end(runs: Path) -> None:
    order = [(line["kind"], line["step"]) for line in lines_of_attempt(runs / "runs" / "writing", 0)]
    assert order.index(("step", 6)) < order.index(("checkpoint", 5)), "step 6 was made while step 5 was being written"
    assert order[-2][0] == "checkpoint" and order[-1][0] == "end", "what the stop saved is durable before the run ends"
    for line in lines(runs / "runs" / "writing", "checkpoint"):
        assert min(line["blocking"], line["seconds"], line["bytes"]) > 0


def lines_of_attempt(run: Path, attempt: int) -> list[dict[str, Any]]:
    from trainer.journal.reader import read

    return [line for line in read(run) if line["attempt"] == attempt and line["kind"] in ("step", "checkpoint", "end")]


def test_a_write_that_failed_in_the_background_is_raised_on_all_ranks_and_the_one_before_is_there(runs: Path) -> None:
    """Two steps after it is known, not at the next save."""
    assert reported(runs, "full")[0] == (
        "checkpoint at step 6 could not be written: [Errno 28] No space left on device; the previous checkpoint is intact: "
        "free disk space, then resume with --resume"
    )
    end = lines(runs / "runs" / "full", "end")[0]
    assert end["status"] == "failed" and "No space left" in end["reason"] and end["step"] == 8
    assert lines(runs / "runs" / "full", "resume")[0]["step"] == 3


def scored_by_timm(file: Path, run: Path, **how: Any) -> Scores:
    """Plain timm's network from a file, on the validation images of a run; nothing of ours computes."""
    config = load(run / "config.yaml")
    m = config.model
    network = timm.create_model(m.name, num_classes=m.classes, img_size=m.image_size, **m.args, **how).eval()
    _, index = open_indexes(config.data)
    shown = validation_set(index, config, 0, 1)
    device = torch.device("cpu")
    return evaluate(lambda images, _: ModelOutput(network(images), None, None), shown, DENSE, m.classes, config.augment, device)


def exported_equals_trained(runs: Path, name: str, tmp_path: Path) -> None:
    run, file = runs / "runs" / name, tmp_path / "w.safetensors"
    for ema in (True, False):
        about = export(run, file, ema=ema).about
        reported = next(line for line in lines(run, "eval")[::-1] if line["ema"] == ema)
        assert about["top1"] == str(reported["top1"]) and about["ema"] == ("true" if ema else "false")
        overlay = {"file": str(file), "num_classes": 10}
        for how in ({"checkpoint_path": str(file)}, {"pretrained": True, "pretrained_cfg_overlay": overlay}):
            found = scored_by_timm(file, run, **how)
            assert (found.top1, found.images) == (reported["top1"], reported["images"])
            assert found.loss == pytest.approx(reported["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["whole", "zero3"])
def test_what_is_exported_is_what_was_trained_for_plain_timm(runs: Path, name: str, tmp_path: Path) -> None:
    exported_equals_trained(runs, name, tmp_path)


@pytest.mark.slow
def test_every_stage_exports(digits: Path, tmp_path: Path) -> None:
    done = job(tmp_path, digits, 2, "zero0", "zero1", "zero2", "zero3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    for stage in range(4):
        exported_equals_trained(tmp_path, f"zero{stage}", tmp_path)


def test_which_checkpoint_is_exported_and_what_its_header_says(runs: Path, tmp_path: Path, capsys: Any) -> None:
    run, file = runs / "runs" / "whole", tmp_path / "w.safetensors"
    assert main(["export", str(run), str(file)]) == 0
    reported = capsys.readouterr().out
    assert "EMA weights of step 9, top-1 " in reported
    network = eval(reported.splitlines()[1], {"timm": timm})  # the line is there to be pasted
    network.load_state_dict(load_file(file), strict=True)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["model"] == "deit_tiny_patch16_224" and header["classes"] == "10" and header["step"] == "9"
    assert header["config"] == load(run / "config.yaml").fingerprint() and header["chain"] == lines(run, "step")[-1]["chain"]
    best = max((line for line in lines(run, "checkpoint")), key=lambda line: line["step"])["step"]
    assert export(run, file, "best").about["step"] == str(best)
    about = export(run, file, "step-00000005", ema=False).about
    assert about["step"] == "5" and "top1" not in about, "it was not evaluated"
    with pytest.raises(ConfigError, match=r"must end with \.safetensors"):
        export(run, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="no checkpoint; give"):
        export(tmp_path, file)
    with pytest.raises(CheckpointError, match=r"state\.json can't be read"):
        export(run, file, "step-00000007")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stop_requested_while_the_first_step_compiles(digits: Path, tmp_path: Path) -> None:
    done = job(tmp_path, digits, 1, "compiling", "whole", more="compile: true, ", timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert "compiling: preempted\n" in done.stdout and "compiling: finished\n" in done.stdout
    assert lines(tmp_path / "runs" / "compiling", "end")[0]["step"] in (1, 2)
    assert seen(tmp_path / "runs" / "compiling") == seen(tmp_path / "runs" / "whole")


RANK = """
import sys, time
from pathlib import Path
from trainer.run.shutdown import install_handlers
stop = install_handlers()
Path("started").touch()
while not stop.requested():
    time.sleep(0.05)
Path("asked").touch()
"""


@pytest.mark.parametrize("above", [1, 2])
def test_the_end_of_a_launcher_is_noticed(tmp_path: Path, above: int) -> None:
    """torchrun above the rank is killed, or our own launcher above torchrun, which lives on without passing a signal on."""
    rank = [sys.executable, "-c", RANK]
    for _ in range(above):
        rank = [sys.executable, "-c", f"import subprocess; subprocess.run({rank!r})"]
    how = {"TORCHELASTIC_RUN_ID": "none"} | ({"TRILEVEL_EXIT_FILE": "exit"} if above == 2 else {})
    process = subprocess.Popen(rank, cwd=tmp_path, env=environment(**how))
    try:
        wait_for(lambda: (tmp_path / "started").exists())
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        wait_for(lambda: (tmp_path / "asked").exists())
    finally:
        kill_if_there(process)
    psutil.wait_procs(below, timeout=60)


@pytest.mark.slow
def test_a_rank_whose_launcher_was_killed_saves_and_ends(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port()), "-m", "trainer"]
    process = subprocess.Popen(
        [sys.executable, *words, "train", "job.yaml", "epochs=100000"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    run = tmp_path / "runs" / "job"
    try:
        wait_for(lambda: (run / "journal.jsonl").exists() and lines(run, "step"), 200)
        (rank,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        rank.wait(90)
    finally:
        kill_if_there(process)
    assert lines(run, "end")[-1]["reason"] == "preempted"
    assert lines(run, "checkpoint")[-1]["step"] == lines(run, "end")[-1]["step"]


def kill_if_there(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        kill(process)


def test_who_is_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in shutdown.STARTED_BY:
        monkeypatch.delenv(name, raising=False)
    assert shutdown.launchers() == [], "a person's shell may end before the run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert shutdown.launchers() == [os.getppid()]
    monkeypatch.setenv("TRILEVEL_EXIT_FILE", "/tmp/exit")
    assert shutdown.launchers() == [os.getppid(), psutil.Process(os.getppid()).ppid()]


@pytest.mark.slow
def test_what_a_save_costs_is_measured(digits: Path, tmp_path: Path, trilevel: Callable[..., Any]) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    reported = trilevel(2, "bench", "checkpoint", "job.yaml", "--saves", "3", "--examples", "1000", "--json", "b.json").stdout
    rows = json.loads((tmp_path / "b.json").read_text())
    assert {name: row["unit"] for name, row in rows.items()} == {"blocking": "s", "writing": "s", "bytes": "MiB"}
    assert all(0 < row["min"] <= row["median"] <= row["max"] for row in rows.values())
    assert f"{rows['blocking']['median']:.3f} / 3600 = " in reported and "2 process(es), deepspeed, zero 1" in " ".join(
        reported.split()
    )
    assert not list((tmp_path / "runs").iterdir())


def test_a_signal_after_the_end_makes_no_failure_of_a_run() -> None:
    """Python puts the default handlers back while it ends, and SIGUSR1's default is death: seen as exit code -10 of a saved run."""
    text = """
import sys
from trainer.run.shutdown import ignore_signals, install_handlers
install_handlers()
print(1, flush=True)
ignore_signals()
sys.exit(75)
"""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", text], env=environment(), stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process, process.stdout as message:
            assert message.readline() == b"1\n"
            while process.poll() is None:
                process.send_signal(signal.SIGUSR1)
                time.sleep(0.0005)  # many in the some 10 ms that Python takes to end, and not one inside the other
        assert process.returncode == 75
