"""Runs with frozen parameters on two processes, under DDP and every ZeRO stage: they keep every bit, have no optimizer
state, and a resume on any world continues."""

from __future__ import annotations

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
from trainer.config.load import load
from trainer.data.shards.index import build_index
from trainer.model import weights
from trainer.train import train

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]  # one start for all runs: seconds on a free machine

RECIPE = """
name: job
epochs: 2
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 8, drop_path: 0.1,
        args: {patch_size: 2, embed_dim: 24, depth: 3, num_heads: 3}}
data: {train: "DIGITS/train-00000[0-1].tar", validation: "DIGITS/validation-000000.tar", batch: 64, micro_batch: 16, workers: 0, lanes: 4}
augment: {crop: none, flip: 0.0}
optim: {lr: 2.0e-3, warmup: 1ep, clip: 1.0, ema: 0.9, layer_decay: 0.75, freeze: 1}
engine: {precision: float32}
control: 0
evaluate: {every: 0ep}
checkpoint: {every: 3step, keep: 9}
tracking: {to: journal}
"""
# DDP first: DeepSpeed leaves its mark in the environment, which a later DDP run in the same process refuses
RUNS = {"ddp": "engine.kind=ddp engine.zero=0"} | {f"zero{stage}": f"engine.zero={stage}" for stage in range(4)}
MORE = {
    "checkpointing": "engine.checkpointing=true",
    "bf16": "engine.precision=bf16 engine.zero=3",
    "autocast": "engine.precision=autocast engine.zero=3",
    "patterns": 'optim.freeze=["*.attn.*","norm.*"] engine.zero=3',
}
FRONT = ("patch_embed.", "cls_token", "pos_embed", "blocks.0.")

SLOW = ("zero0", "zero1", "zero2", "checkpointing", "bf16", "autocast", "patterns")  # runs that `make test` leaves out
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in (*RUNS, *MORE)]


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every run whole, and again from its third step; in runs/NAME and runs/NAME-resumed."""
    folder = tmp_path_factory.mktemp("frozen")
    config = folder / "job.yaml"
    config.write_text(RECIPE.replace("DIGITS", str(digits)))
    for pattern in ("train-00000[0-1].tar", "validation-000000.tar"):
        build_index(str(digits / pattern), progress=False)
    words = [f"{name} {settings}" for name, settings in (RUNS | MORE).items() if slow_tests_of(request) or name not in SLOW]
    job = [str(ROOT / "tests" / "support" / "jobs" / "mechanisms.py"), str(config), "3", *words]
    done = subprocess.run(
        [sys.executable, *torchrun(2), *job], cwd=folder, env=environment(), capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def first(folder: Path) -> dict[str, torch.Tensor]:
    return weights.create(load(folder / "job.yaml").model).state_dict()


def losses(run: Path) -> np.ndarray:
    return np.array([[line["loss"], line["grad_norm"]] for line in lines(run, "step")])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_keeps_its_bits_and_has_no_state_and_the_rest_trains(folder: Path, name: str):
    begun = first(folder)
    frozen = {
        one for one in begun if (".attn." in one or one.startswith("norm.") if name == "patterns" else one.startswith(FRONT))
    }
    last = sorted((folder / "runs" / name / "checkpoints").glob("step-*"))[-1]
    now, average = load_file(last / "weights.safetensors"), load_file(last / "ema.safetensors")
    if name == "bf16":  # the mode keeps parameters in bf16, and master weights only of what trains
        begun = {one: value.bfloat16().float() for one, value in begun.items()}
    same = {one for one in begun if torch.equal(now[one], begun[one])}
    assert same == frozen and all(torch.equal(average[one].float(), begun[one]) for one in frozen)
    assert {key.split("|")[0] for key in load_file(last / "optimizer.safetensors")} - {""} == begun.keys() - frozen


def test_ddp_and_every_zero_stage_lose_the_same(folder: Path):
    ddp = losses(folder / "runs" / "ddp")
    for name in [*RUNS, "checkpointing"]:
        if not (folder / "runs" / name).exists():
            continue  # a slow one
        np.testing.assert_allclose(losses(folder / "runs" / name), ddp, rtol=5e-4, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_continues_bit_for_bit(folder: Path, name: str):
    whole, resumed = losses(folder / "runs" / name), losses(folder / "runs" / f"{name}-resumed")
    assert len(resumed) == len(whole) - 3 > 0 and (resumed == whole[3:]).all()


def test_one_process_continues_what_two_with_zero_3_began(folder: Path, monkeypatch: pytest.MonkeyPatch):
    step = Path("checkpoints") / "step-00000003"
    for name in ("elastic", "thawed"):
        shutil.copytree(folder / "runs" / "zero3" / step, folder / "runs" / name / step)
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match=r"optim.freeze: checkpoint 1, now 0"):
        train(load("job.yaml", ["engine.kind=ddp", "engine.zero=0", "name=thawed", "optim.freeze=0"]), resume=True)
    train(load("job.yaml", ["engine.kind=ddp", "engine.zero=0", "name=elastic"]), resume=True)
    np.testing.assert_allclose(losses(folder / "runs" / "elastic"), losses(folder / "runs" / "zero3")[3:], rtol=5e-4)
