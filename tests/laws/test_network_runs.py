"""Short runs of a ConvNeXt and a Swin in one process: what their journals say of steps, multiply-adds and MFU, and what compare and report
make of it. Whole runs on two processes: test_every_network.py."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsity.types import DENSE, Plan
from tests.conftest import lines
from trainer.analysis.comparison.groups import compare
from trainer.analysis.history import history
from trainer.config.load import load
from trainer.data.shards.index import build_index
from trainer.model.build import build_model
from trainer.train import train

RECIPE = """
name: job
epochs: 2
log_every: 1step
model: {name: convnext_atto, classes: 10, image_size: 32, args: {depths: [1, 1, 1, 1], dims: [4, 4, 8, 8]}}
data: {train: "DIGITS/train-000000.tar", validation: "DIGITS/validation-000000.tar", batch: 16, micro_batch: 16, workers: 0, lanes: 4}
augment: {crop: none, flip: 0.0}
engine: {precision: float32, kind: ddp}
control: 0
checkpoint: {every: 9ep}
evaluate: {batch: 16}
tracking: {to: journal}
"""
pytestmark = pytest.mark.slow  # three runs, 80 s of CPU

SWIN = (
    "model.name=swin_tiny_patch4_window7_224 tokens.method=topk tokens.keep=.5 tokens.blocks=[2] tokens.position=block "
    "model.args={patch_size:4,window_size:4,embed_dim:4,depths:[1,1,3,1],num_heads:[1,1,2,2]}"
)
RUNS = {"dense": "", "fewer": "examples.method=random_epoch examples.removed=.25", "swin": SWIN}
BATCH = 16


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("network_runs")
    config = folder / "job.yaml"
    config.write_text(RECIPE.replace("DIGITS", str(digits)))
    for part in ("train-000000.tar", "validation-000000.tar"):
        build_index(str(digits / part), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a network waits for a second thread longer than it computes
        for name, words in RUNS.items():
            train(load(config, [*words.split(), f"name={name}"]))
        torch.set_num_threads(threads)
    return {name: folder / "runs" / name for name in RUNS}


def counted(run: Path, plan: Plan) -> float:
    """Multiply-adds of an image, by torch, while the run's network computes one."""
    model = build_model(load(run / "config.yaml")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32), plan)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("name", "plan"), [("dense", DENSE), ("fewer", DENSE), ("swin", Plan(0.5))])
def test_mfu_is_of_the_multiply_adds_that_torch_counts(runs, name, plan):
    start, steps = lines(runs[name], "start")[0], lines(runs[name], "step")
    own, dense = counted(runs[name], plan), counted(runs[name], DENSE)
    assert lines(runs[name], "plateau")[-1]["multiply_adds"] == pytest.approx(own, rel=2e-3)
    assert start["multiply_adds"] == pytest.approx(dense, rel=2e-3) and (own < dense) == (name == "swin")
    for step in steps:
        rate = step["mfu"] * start["matrix_tflops"] * 1e12 / step["images_per_second"]
        assert rate == pytest.approx(6 * own, rel=2e-3)  # forward and backward, two operations each
        assert ("tokens_per_second" in step) == (name == "swin")


def test_steps_of_an_epoch_fall_by_the_share_that_is_left_out(runs):
    """So do its seconds, where a step takes as long: level 1 adds what trilevel bench step calls bookkeeping."""
    every = lines(runs["dense"], "epoch")[0]["examples"]
    for name, shown in (("dense", every), ("fewer", every * 3 // 4)):
        epochs = lines(runs[name], "epoch")
        assert [epoch["steps"] for epoch in epochs] == [shown // BATCH] * 2, name
        assert len(lines(runs[name], "step")) == 2 * (shown // BATCH)
        assert [epoch["kept"] for epoch in epochs] == pytest.approx([shown] * 2, abs=1)


def test_compare_and_report_know_what_each_network_kept(runs):
    found = compare([runs["fewer"], runs["dense"]])
    assert found.base.name == "dense"  # the one run that kept everything
    against = found.groups[1].against
    assert against is not None
    whole = against.whole
    assert (
        whole["multiply-adds"].mean
        == whole["images"].mean
        == pytest.approx(len(lines(runs["dense"], "step")) / len(lines(runs["fewer"], "step")))
    )
    kept = {name: [history(runs[name]).mean_share(part) for part in ("examples", "tokens")] for name in runs}
    swin = lines(runs["swin"], "plateau")[0]["tokens"], lines(runs["swin"], "start")[0]["tokens"]
    assert swin == ([64, 16, 4, 2, 2, 1], [64, 16, 4, 4, 4, 1])
    expected = {"dense": [1, 1], "fewer": [0.75, 1], "swin": [1, 89 / 93]}
    assert all(kept[name] == pytest.approx(expected[name], abs=0.01) for name in runs)
    assert history(runs["fewer"]).saved == pytest.approx(0.25, abs=0.01)
    share = lines(runs["swin"], "plateau")[0]["multiply_adds"] / lines(runs["swin"], "start")[0]["multiply_adds"]
    assert history(runs["swin"]).saved == pytest.approx(1 - share)
