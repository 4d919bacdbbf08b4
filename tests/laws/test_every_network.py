"""Whole runs of networks that are no plain VisionTransformer, on two processes: interrupted = uninterrupted bit for bit, running
statistics and their average included (law 2 of docs/laws.md); and with model.sync_batchnorm one process is two (law 3 of
docs/laws.md)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import ROOT, environment, lines, torchrun
from trainer.config.load import load
from trainer.data.shards.index import build_index
from trainer.train import train

RESNET = "model.name=resnet18 model.args={layers:[1,1,1,1],channels:[8,8,16,16]}"
CONVNEXT = "model.image_size=32 model.name=convnext_atto model.args={depths:[1,1,2,1],dims:[8,8,16,16]} model.drop_path=.2"
ACCUMULATED = "data.micro_batch=16"  # two micro-batches of each of two processes
SWIN = (
    "model.image_size=32 model.name=swin_tiny_patch4_window7_224 model.drop_path=.2 examples.ties=spread tokens.method=topk tokens.keep=.6 "
    "model.args={patch_size:2,window_size:4,embed_dim:12,depths:[1,1,4,1],num_heads:[1,2,2,2]} tokens.blocks=[2,3] tokens.position=block"
)
SYNCED = f"{RESNET} model.sync_batchnorm=true engine.kind=ddp"
ROWS = {
    "resnet under DDP": f"{RESNET} {ACCUMULATED} engine.kind=ddp",
    "resnet, norms over both processes": SYNCED,
    "resnet under ZeRO 3": f"{RESNET} engine.zero=3",
    "convnext under ZeRO 2": f"{CONVNEXT} {ACCUMULATED} engine.zero=2",
    "swin with tokens left out, under ZeRO 1": f"{SWIN} {ACCUMULATED} engine.zero=1",
}
RECIPE = """
name: job
epochs: 4
log_every: 1step
model: {name: resnet18, classes: 10, image_size: 16}
data: {train: "DIGITS/train-00000[0-1].tar", validation: "DIGITS/validation-000000.tar", batch: 64, micro_batch: 32, workers: 0, lanes: 4}
augment: {crop: none, flip: 0.0, mixup: 0.2}
optim: {lr: 2.0e-3, warmup: 1ep, ema: 0.9}
examples: {method: forgetting, removed: 0.4, swap: 0.05, window: 3ep, updates: 1, ties: id}
engine: {precision: float32}
control: 0
evaluate: {every: 2ep}
checkpoint: {every: 5step, keep: 9}
tracking: {to: journal}
"""


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Each row trained whole, and resumed from its fifth step: the two run directories."""
    folder = tmp_path_factory.mktemp("networks")
    config = folder / "job.yaml"
    config.write_text(RECIPE.replace("DIGITS", str(digits)))
    for pattern in ("train-00000[0-1].tar", "validation-000000.tar"):
        build_index(str(digits / pattern), progress=False)
    runs = [f"run-{number} {words}" for number, words in enumerate(ROWS.values())]
    job = [str(ROOT / "tests" / "support" / "jobs" / "mechanisms.py"), str(config), "5", *runs]
    done = subprocess.run(
        [sys.executable, *torchrun(2), *job], cwd=folder, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {row: (folder / "runs" / f"run-{n}", folder / "runs" / f"run-{n}-resumed") for n, row in enumerate(ROWS)}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS)
def test_interrupted_is_uninterrupted(trained, row):
    whole, resumed = trained[row]
    names = ("loss", "grad_norm", "chain", "train_top1")
    steps = {line["step"]: [line[name] for name in names] for line in lines(whole, "step")}
    again = {line["step"]: [line[name] for name in names] for line in lines(resumed, "step")}
    assert list(again) == list(range(6, len(steps) + 1)) and all(again[step] == steps[step] for step in again)
    scores, scores_again = ([(e["ema"], e["loss"], e["top1"]) for e in lines(run, "eval")] for run in (whole, resumed))
    assert scores[-len(scores_again) :] == scores_again and {ema for ema, *_ in scores_again} == {False, True}
    for file in ("weights", "ema"):
        (a,), (b,) = (sorted((run / "checkpoints").glob(f"step-*{len(steps)}/{file}.safetensors")) for run in (whole, resumed))
        ours, theirs = load_file(a), load_file(b)
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        assert any("running_var" in name for name in ours) == ("resnet" in row)


@pytest.mark.slow
@pytest.mark.dist
def test_norms_over_all_processes_make_one_process_two(trained, tmp_path, monkeypatch):
    """The loss of each step and the running statistics agree to rounding; without the setting they do not."""
    monkeypatch.chdir(tmp_path)
    config = trained["resnet under DDP"][0].parent.parent / "job.yaml"
    train(load(config, [*SYNCED.split(), "data.micro_batch=64", "name=alone"]))
    alone = np.array([line["loss"] for line in lines(tmp_path / "runs" / "alone", "step")])
    synced, own = (
        np.array([line["loss"] for line in lines(trained[row][0], "step")])
        for row in ("resnet, norms over both processes", "resnet under DDP")
    )
    np.testing.assert_allclose(synced, alone, rtol=2e-3)
    assert np.abs(own - alone).max() > 10 * np.abs(synced - alone).max()
    runs = trained["resnet, norms over both processes"][0], tmp_path / "runs" / "alone"
    ours, theirs = (load_file(run / "weights.safetensors") for run in runs)
    for name in (name for name in ours if "running" in name):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-2, atol=1e-3, err_msg=name)
