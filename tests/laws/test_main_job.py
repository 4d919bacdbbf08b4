"""The main job for real: processes, DeepSpeed over gloo, digits in shards, dropping active. Laws 2, 3, 4 and 6 of
docs/laws.md."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import command, environment, kill, lines, started, wait_for

pytestmark = pytest.mark.dist
Trilevel = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE = """
name: job
epochs: 4
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32, drop_path: 0.1,
        args: {patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}}
data: {train: "DIGITS/train-*.tar", validation: "DIGITS/validation-*.tar", batch: 128, micro_batch: 32, workers: 1, lanes: 4,
       window: 256}
augment: {crop: shift, shift: 2, flip: 0.0, mixup: 0.2, cutmix: 1.0, erasing: 0.25}
optim: {lr: 2.0e-3, warmup: 1ep, clip: 1.0, ema: 0.9}
examples: {method: forgetting, removed: 0.4, swap: 0.05, window: 3ep, updates: 1, rule: dominant}
tokens: {method: topk, keep: 0.7, blocks: [1, 2]}
connections: {method: shared_keys, keep: 0.5}
plan: {method: cosine, warmup: 1ep, length: 2ep, plateaus: 2}
engine: {zero: 1, precision: float32}
tracking: {to: journal}
"""


@pytest.fixture(scope="module")
def recipe(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "job.yaml"
    path.write_text(RECIPE.replace("DIGITS", str(digits)))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run: 2 processes, from the first step to the last."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        command(2, "train", str(recipe)), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder / "runs" / "job"


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run, "step")}


def chains(run: Path) -> dict[int, str]:
    return {line["step"]: line["chain"] for line in lines(run, "step")}


def test_the_job_learns_drops_and_leaves_a_whole_run_directory(whole: Path) -> None:
    epochs, scores = lines(whole, "epoch"), lines(whole, "eval")
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3]
    assert {line["kept"] for line in epochs} == {round(0.6 * epochs[0]["examples"])}
    assert epochs[3]["facts"]["hash"] != epochs[0]["facts"]["hash"], "the update at epoch 3 exchanges examples"
    assert len(lines(whole, "plateau")) == 4  # dense, two plateaus on the way down, the final one
    assert scores[-1]["images"] == 359 and {line["ema"] for line in scores} == {False, True}
    assert list(losses(whole)) == list(range(1, 1 + sum(line["steps"] for line in epochs)))
    assert np.mean(list(losses(whole).values())[-5:]) < np.mean(list(losses(whole).values())[:5])
    for name in ("config.yaml", "source.txt", "journal.jsonl", "weights.safetensors", "checkpoints/latest"):
        assert (whole / name).is_file(), name


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)])
def other_world(request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    words = ["train", str(recipe), "data.workers=0" if request.param == 3 else "data.workers=2"]
    done = subprocess.run(
        command(request.param, *words), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    yield folder / "runs" / "job"


def test_any_world_and_any_workers_see_the_same_and_lose_the_same(whole: Path, other_world: Path) -> None:
    assert chains(other_world) == chains(whole)
    ours, theirs = losses(whole), losses(other_world)
    assert ours.keys() == theirs.keys()
    # rounding, drop path included: its masks are keyed by example, not by rank
    np.testing.assert_allclose(list(theirs.values()), list(ours.values()), rtol=2e-4)
    first = [1, 2, 3]
    np.testing.assert_allclose([theirs[s] for s in first], [ours[s] for s in first], rtol=2e-6)


@pytest.mark.slow  # as after a signal, below
def test_stopped_in_mid_epoch_and_resumed_is_the_uninterrupted_run_bit_for_bit(
    whole: Path, recipe: Path, trilevel: Trilevel, tmp_path: Path
) -> None:
    trilevel(2, "train", str(recipe), "stop_at=9step")
    state = json.loads((tmp_path / "runs/job/checkpoints/step-00000009/state.json").read_text())["state"]
    assert state["batch"] != 0, "a position inside an epoch"
    trilevel(2, "train", str(recipe), "--resume")
    run = tmp_path / "runs" / "job"
    assert chains(run) == chains(whole)
    assert losses(run) == losses(whole)
    ours, theirs = lines(whole, "eval"), lines(run, "eval")
    assert [(e["step"], e["ema"], e["top1"], e["loss"]) for e in ours] == [
        (e["step"], e["ema"], e["top1"], e["loss"]) for e in theirs
    ]


@pytest.mark.slow
def test_resumed_on_fewer_and_more_processes_and_another_zero_stage(
    whole: Path, recipe: Path, trilevel: Trilevel, tmp_path: Path
) -> None:
    trilevel(2, "train", str(recipe), "stop_at=5step")
    trilevel(1, "train", str(recipe), "--resume", "stop_at=12step", "engine.zero=2")
    trilevel(3, "train", str(recipe), "--resume", "engine.zero=0")
    run = tmp_path / "runs" / "job"
    assert chains(run) == chains(whole)
    np.testing.assert_allclose(list(losses(run).values()), list(losses(whole).values()), rtol=2e-4)


def test_a_signal_saves_and_a_kill_loses_only_what_was_not_saved(
    whole: Path, recipe: Path, trilevel: Trilevel, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "job"
    ranks = ["train", str(recipe), "checkpoint.every=4step"]
    process = started(tmp_path, 2, *ranks)
    wait_for(lambda: (run / "journal.jsonl").exists() and len(lines(run, "step")) >= 2)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    assert lines(run, "end")[-1]["reason"] == "preempted"
    saved = lines(run, "checkpoint")[-1]["step"]

    process = started(tmp_path, 2, *ranks, "--resume")
    wait_for(lambda: any(line["step"] > saved for line in lines(run, "checkpoint")))
    kill(process)
    assert not any(line["attempt"] == 1 for line in lines(run, "end")), "killed, not ended"
    trilevel(2, *ranks, "--resume")
    assert chains(run) == chains(whole)
    assert losses(run) == losses(whole)
    assert {line["attempt"] for line in lines(run, "step")} == {0, 1, 2}


@pytest.mark.slow  # tests/engine/test_deepspeed_conflicts.py starts a run by `accelerate launch` in `make test`
def test_accelerate_launch_does_the_same_job(whole: Path, recipe: Path, tmp_path: Path) -> None:
    words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]

    done = subprocess.run(
        [sys.executable, *words, "-m", "trainer", "train", str(recipe), "stop_at=4step"],
        cwd=tmp_path, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    run = tmp_path / "runs" / "job"
    assert lines(run, "start")[0]["world"] == 2
    assert chains(run) == {step: chains(whole)[step] for step in range(1, 5)}
    # accelerate starts its processes with other OpenMP settings than torchrun: the same sums to rounding
    np.testing.assert_allclose(list(losses(run).values()), [losses(whole)[step] for step in range(1, 5)], rtol=1e-6)
