"""A run that is asked to stop, wherever it is, leaves a checkpoint from which it goes on as if nobody had asked. Law 6 of the design."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, environment, free_port, kill, lines, wait_for
from trainer import stopping

pytestmark = pytest.mark.dist

RECIPE = """
name: job
epochs: 3
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 16, drop_path: 0.1,
        args: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}}
data: {train: "DIGITS/train-*.tar", validation: "DIGITS/validation-*.tar", batch: 480, micro_batch: 240, workers: 0, lanes: 4,
       window: 256}
augment: {crop: none, flip: 0.0}
optim: {warmup: 1ep, ema: 0.9}
evaluate: {batch: 64}
checkpoint: {every: 3step, keep: 9}
engine: {zero: 1, precision: float32}
tracking: {to: journal}
"""
SCENES = ("training", "evaluating", "writing", "full")


def job(folder: Path, digits: Path, world: int, *scenes: str, more: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)) + more)
    words = [str(ROOT / "tests" / "preempted_job.py"), "job.yaml", *scenes]
    run = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(free_port())]
    return subprocess.run(
        [sys.executable, *run, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preempted")
    done = job(folder, digits, 2, "whole", *SCENES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (folder / "told.txt").write_text(done.stdout)
    return folder


def told(runs: Path, scene: str) -> list[str]:
    return [line.split(": ", 1)[1] for line in (runs / "told.txt").read_text().splitlines() if line.startswith(f"{scene}: ")]


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
    assert told(runs, scene)[-1] == "finished"
    assert seen(runs / "runs" / scene) == seen(runs / "runs" / "whole")
    assert {line["attempt"] for line in lines(runs / "runs" / scene, "step")} == {0, 1}


def test_the_run_stops_where_it_was_asked(runs: Path) -> None:
    ends = {scene: lines(runs / "runs" / scene, "end")[0] for scene in SCENES}
    for scene in ("training", "evaluating", "writing"):
        assert told(runs, scene)[0] == "preempted"
        assert (ends[scene]["status"], ends[scene]["reason"]) == ("stopped", "preempted")
    assert ends["training"]["step"] == 5  # asked in the fifth step
    assert ends["evaluating"]["step"] == 4  # the second epoch's evaluation, left between two batches, and owed
    assert [line["attempt"] for line in lines(runs / "runs" / "evaluating", "eval") if line["step"] == 4] == [1, 1]
    assert ends["writing"]["step"] in (4, 5)


def test_the_writing_goes_on_beside_the_training_and_is_waited_for(runs: Path) -> None:
    order = [(line["kind"], line["step"]) for line in lines_of_attempt(runs / "runs" / "writing", 0)]
    assert order.index(("step", 4)) < order.index(("checkpoint", 3)), "step 4 was made while step 3 was being written"
    assert order[-2][0] == "checkpoint" and order[-1][0] == "end", "what the stop saved is durable before the run ends"
    for line in lines(runs / "runs" / "writing", "checkpoint"):
        assert min(line["blocking"], line["seconds"], line["bytes"]) > 0


def lines_of_attempt(run: Path, attempt: int) -> list[dict[str, Any]]:
    from trainer.journal import read

    return [line for line in read(run) if line["attempt"] == attempt and line["kind"] in ("step", "checkpoint", "end")]


def test_a_write_that_failed_in_the_background_is_raised_on_all_ranks_and_the_one_before_is_there(runs: Path) -> None:
    """Step 6 is the last: its failure comes out of the wait at the end."""
    assert told(runs, "full")[0] == (
        "checkpoint at step 6 could not be written: [Errno 28] No space left on device; the one before is whole: make room, "
        "then --resume"
    )
    end = lines(runs / "runs" / "full", "end")[0]
    assert end["status"] == "failed" and "No space left" in end["reason"]
    assert lines(runs / "runs" / "full", "resume")[0]["step"] == 3


def test_a_rank_whose_launcher_was_killed_saves_and_ends(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port()), "-m", "trainer"]
    process = subprocess.Popen(
        [sys.executable, *words, "train", "job.yaml", "epochs=100000"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    run = tmp_path / "runs" / "job"
    try:
        wait_for(lambda: (run / "journal.jsonl").exists() and lines(run, "step"))
        (rank,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        rank.wait(120)
    finally:
        kill_if_there(process)
    assert lines(run, "end")[-1]["reason"] == "preempted"
    assert lines(run, "checkpoint")[-1]["step"] == lines(run, "end")[-1]["step"]


def kill_if_there(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        kill(process)


def test_who_is_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in stopping.STARTED_BY:
        monkeypatch.delenv(name, raising=False)
    assert stopping.launchers() == [], "a person's shell may end before the run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert stopping.launchers() == [os.getppid()]
    monkeypatch.setenv("TRILEVEL_EXIT_FILE", "/tmp/exit")
    assert stopping.launchers() == [os.getppid(), psutil.Process(os.getppid()).ppid()]
