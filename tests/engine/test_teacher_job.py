"""Runs with a teacher on two processes, under DDP and every ZeRO stage: the same losses, resumed bit for bit, its hash saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, environment, lines, slow_tests_of, torchrun
from trainer.checkpoint.save_load import CheckpointError
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.data.shards.index import build_index
from trainer.journal.reader import lineage
from trainer.model import weights
from trainer.tracking.metrics import metrics, tags
from trainer.train import train

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]  # one start for all runs: seconds on a free machine

RECIPE = """
name: job
epochs: 2
log_every: 1step
model: {name: deit_tiny_distilled_patch16_224, classes: 10, image_size: 8, drop_path: 0.1,
        args: {patch_size: 2, embed_dim: 24, depth: 3, num_heads: 3}}
data: {train: "DIGITS/train-00000[0-1].tar", validation: "DIGITS/validation-000000.tar", batch: 64, micro_batch: 16, workers: 0, lanes: 4}
augment: {crop: none, flip: 0.0, mixup: 0.2, cutmix: 1.0}
optim: {lr: 2.0e-3, warmup: 1ep, clip: 1.0, ema: 0.9}
tokens: {method: topk, keep: 0.6, blocks: [1], position: block}
teacher: {from: teacher.safetensors, tokens: 1.0, logits: soft, tau: 2.0, alpha: 0.4}
engine: {precision: float32}
control: 0
evaluate: {every: 0ep}
checkpoint: {every: 3step, keep: 9}
tracking: {to: journal}
"""
# DDP first: DeepSpeed leaves its mark in the environment, which a later DDP run in the same process refuses
RUNS = {"ddp": "engine.kind=ddp engine.zero=0"} | {f"zero{stage}": f"engine.zero={stage}" for stage in range(4)}
MORE = {
    "bf16": "engine.precision=bf16",
    "checkpointing": "engine.checkpointing=true",
    "drawn": "plan.method=dense_sparse evaluate.densities=[0.5]",
    "hard": "teacher.logits=hard teacher.tau=1.0",
}

SLOW = ("zero0", "zero2", "hard", "checkpointing", "bf16")  # runs that `make test` leaves out
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in (*RUNS, *MORE)]


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every run whole, and again from its third step; in runs/NAME and runs/NAME-resumed."""
    folder = tmp_path_factory.mktemp("taught")
    config = folder / "job.yaml"
    config.write_text(RECIPE.replace("DIGITS", str(digits)))
    for pattern in ("train-00000[0-1].tar", "validation-000000.tar"):
        build_index(str(digits / pattern), progress=False)
    for name, seed in (("teacher", 1), ("other", 2)):
        state = weights.create(load(config).model, seed).state_dict()
        # far from the initialisation, whose attention and predictions are nearly uniform in every network
        state |= {
            one: 30 * value for one, value in state.items() if one.endswith(("qkv.weight", "head.weight", "head_dist.weight"))
        }
        weights.save_weights(folder / f"{name}.safetensors", state)
    words = [f"{name} {settings}" for name, settings in (RUNS | MORE).items() if slow_tests_of(request) or name not in SLOW]
    job = [str(ROOT / "tests" / "support" / "jobs" / "mechanisms.py"), str(config), "3", *words]
    done = subprocess.run(
        [sys.executable, *torchrun(2), *job], cwd=folder, env=environment(), capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def losses(run: Path) -> np.ndarray:
    names = ("loss", "loss_labels", "loss_logits", "loss_tokens")
    return np.array([[line[name] for name in names] for line in lines(run, "step")])


def test_ddp_and_every_zero_stage_lose_the_same(folder: Path):
    first = losses(folder / "runs" / "ddp")
    assert len(first) > 3 and (first[:, 1:] > 1e-3).all()
    np.testing.assert_allclose(first[:, 0], 0.6 * first[:, 1] + 0.4 * first[:, 2] + first[:, 3], rtol=1e-5)
    for name in [*RUNS, "checkpointing"]:
        if not (folder / "runs" / name).exists():
            continue  # a slow one
        np.testing.assert_allclose(losses(folder / "runs" / name), first, rtol=5e-4, atol=1e-6, err_msg=name)
    if not (folder / "runs" / "hard").exists():
        return
    hard = losses(folder / "runs" / "hard")
    assert hard[0, 1] == pytest.approx(first[0, 1], rel=1e-5) and hard[0, 2] != pytest.approx(first[0, 2], rel=1e-2)


@pytest.mark.slow
def test_bf16_loses_nearly_the_same(folder: Path):
    np.testing.assert_allclose(losses(folder / "runs" / "bf16")[0], losses(folder / "runs" / "ddp")[0], rtol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_with_the_same_teacher_continues_bit_for_bit(folder: Path, name: str):
    whole, resumed = losses(folder / "runs" / name), losses(folder / "runs" / f"{name}-resumed")
    assert len(resumed) == len(whole) - 3 and (resumed == whole[3:]).all()


def test_drawn_densities_change_the_steps_and_are_scored(folder: Path):
    """SaiT with everything at once: a teacher, EMA, ZeRO 1 on two ranks; resumed above."""
    drawn, fixed = losses(folder / "runs" / "drawn"), losses(folder / "runs" / "zero1")
    assert not np.allclose(drawn, fixed, rtol=1e-3)
    (plateau,) = lines(folder / "runs" / "drawn", "plateau")
    assert plateau["draws"] == [[0.5, 1.0, 1.0]] + [[pytest.approx(1 / 6), keep, 1.0] for keep in (0.35, 0.5, 0.7)]
    assert {line["keep_tokens"] for line in lines(folder / "runs" / "drawn", "step")} == {plateau["keep_tokens"]}
    scored = lines(folder / "runs" / "drawn", "density")
    assert [(line["ema"], line["keep_tokens"]) for line in scored] == [(False, 0.5), (True, 0.5)]


def test_the_teacher_is_in_no_checkpoint_but_its_hash(folder: Path):
    last = sorted((folder / "runs" / "zero3" / "checkpoints").glob("step-*"))[-1]
    state = load_file(last / "weights.safetensors")
    model = weights.create(load(folder / "job.yaml").model)
    assert state.keys() == model.state_dict().keys()
    own = {name.split("|")[0] for name in load_file(last / "optimizer.safetensors")} - {""}
    assert own == {name for name, _ in model.named_parameters()}
    start = lines(folder / "runs" / "zero3", "start")[0]
    assert json.loads((last / "state.json").read_text())["teacher"] == start["teacher_hash"] != ""
    teacher = load_file(folder / "teacher.safetensors")
    assert not any(torch.equal(state[name], teacher[name]) for name in state if state[name].ndim > 1)


def test_its_time_and_memory_are_apart_in_the_journal_and_in_mlflow(folder: Path):
    run = folder / "runs" / "zero1"
    step = next(line for line in lines(run, "step") if "teacher" in line.get("phases", {}))
    assert 0 < step["phases"]["teacher"]["median"] < 1
    assert abs(sum(phase["median"] for name, phase in step["phases"].items() if name != "communication") - 1) < 0.05
    shipped = {metric.key for metric in metrics(step, step["step"])}
    assert {"basic/loss_labels", "basic/loss_logits", "basic/loss_tokens", "debug/phases/teacher/median"} <= shipped
    start = next(line for line in lineage(run) if line["kind"] == "start")
    wanted = {"teacher_hash", "teacher_parameters", "teacher_memory_mib", "teacher_multiply_adds"}
    assert wanted <= tags(start).keys() and start["teacher_multiply_adds"] == start["multiply_adds"]


def continued(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Resume a copy of a run's third step, in this process."""
    shutil.copytree(
        folder / "runs" / "ddp" / "checkpoints" / "step-00000003", folder / "runs" / name / "checkpoints" / "step-00000003"
    )
    monkeypatch.chdir(folder)
    train(load("job.yaml", ["engine.kind=ddp", "engine.zero=0", f"name={name}", *words]), resume=True)


def test_a_resume_with_another_teacher_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        CheckpointError, match=r"teacher: checkpoint was trained with weights of hash \w+, teacher.from=other.safetensors is"
    ):
        continued(folder, "other", monkeypatch, "teacher.from=other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)teacher.alpha.*teacher: checkpoint was trained with .*teacher.from=none is no teacher"
    ):
        none = ["teacher.from=none", "teacher.tokens=0", "teacher.logits=none", "teacher.tau=1", "teacher.alpha=.5"]
        continued(folder, "without", monkeypatch, *none)
    with pytest.raises(ConfigError, match=r"weights gone.safetensors: no such file"):
        continued(folder, "gone", monkeypatch, "teacher.from=gone.safetensors")


@pytest.mark.slow
def test_a_teacher_may_move_between_attempts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save({"model": weights.load_weights(folder / "teacher.safetensors")}, folder / "moved.pth")
    continued(folder, "moved", monkeypatch, "teacher.from=moved.pth")
    np.testing.assert_allclose(
        losses(folder / "runs" / "moved"), losses(folder / "runs" / "ddp")[3:], rtol=5e-4, atol=1e-6
    )  # on one process
