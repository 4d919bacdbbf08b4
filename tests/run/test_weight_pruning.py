"""Level 4 in a run: what leaves is gone from weights, moments and averages, stays gone, and an interrupted run is the uninterrupted one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, environment, lines, torchrun
from trainer import load_model
from trainer.__main__ import main
from trainer.analysis.comparison import page as compare_page
from trainer.analysis.comparison.groups import compare, dense
from trainer.analysis.history import history
from trainer.analysis.report.summary import summary
from trainer.checkpoint.export import export
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.data.shards.index import build_index
from trainer.model.build import build_model, build_pruning, refuse_frozen
from trainer.model.optimizer import build_optimizer

RECIPE = """
name: job
epochs: 4
log_every: 1step
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 8, drop_path: 0.1,
        args: {patch_size: 2, embed_dim: 24, depth: 2, num_heads: 3}}
data: {train: "DIGITS/train-00000[0-1].tar", validation: "DIGITS/validation-000000.tar", batch: 64, micro_batch: 32, workers: 0, lanes: 4}
augment: {crop: none, flip: 0.0}
optim: {lr: 2.0e-3, warmup: 1ep, clip: 1.0, ema: 0.9}
weights: {method: admm, keep: 0.5, groups: units, layers: ["*"], start: 1ep, prune: 2ep}
engine: {kind: ddp, zero: 0, precision: float32}
control: 0
evaluate: {every: 9ep}
checkpoint: {every: 5step, keep: 9}
tracking: {to: journal}
"""
MODES = ("kind=ddp engine.zero=0", "zero=0", "zero=1", "zero=2", "zero=3", "zero=1 engine.precision=autocast")
FACTS = ("loss", "grad_norm", "chain")


def continued(run: Path, step: int, name: str) -> None:
    """A run directory NAME that has nothing but one checkpoint of `run`."""
    checkpoint = f"checkpoints/step-{step:08d}"
    shutil.copytree(run / checkpoint, run.parent / name / checkpoint)


def seen(run: Path) -> dict[int, tuple]:
    return {line["step"]: tuple(line[name] for name in FACTS) for line in lines(run, "step")}


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of one process, and one that continues from its 10th step, masked; from a penalty: tests/laws/test_every_mechanism.py."""
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    for pattern in ("train-00000[0-1].tar", "validation-000000.tar"):
        build_index(str(digits / pattern), progress=False)
    words = ["train", str(folder / "job.yaml"), f"runs={folder / 'runs'}"]
    assert main(words) == 0
    continued(folder / "runs" / "job", 10, "resumed")
    assert main([*words, "name=resumed", "--resume"]) == 0
    return folder


def test_interrupted_is_uninterrupted_bit_for_bit(folder: Path) -> None:
    whole, again = (seen(folder / "runs" / name) for name in ("job", "resumed"))
    assert list(again) == list(range(11, 17)) and again == {key: whole[key] for key in again}
    for name in ("weights", "ema", "optimizer"):
        mine, other = (
            load_file(folder / "runs" / run / f"checkpoints/step-00000016/{name}.safetensors") for run in ("job", "resumed")
        )
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_what_left_is_gone_from_weights_moments_and_averages_for_good(folder: Path) -> None:
    """Half of the units of every MLP: in the state 2 and 8 steps after they left, and nothing of the others is 0."""
    for step in (10, 16):
        path = folder / "runs" / "job" / "checkpoints" / f"step-{step:08d}"
        weights, averages, moments, state = (
            load_file(path / f"{name}.safetensors") for name in ("weights", "ema", "optimizer", "pruning")
        )
        for block in (0, 1):
            kept = state[f"kept.blocks.{block}.mlp"][0]
            assert kept.tolist().count(True) == 48 and len(kept) == 96
            for found in (
                weights,
                averages,
                *({name: moments[f"{name}|{key}"] for name in weights} for key in ("exp_avg", "exp_avg_sq")),
            ):
                fc1, bias, fc2 = (found[f"blocks.{block}.mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight"))
                assert (
                    torch.equal(fc1.ne(0).any(1), kept)
                    and torch.equal(fc2.ne(0).any(0), kept)
                    and torch.equal(bias.ne(0), kept)
                )


def test_the_journal_has_what_is_left(folder: Path) -> None:
    found = lines(folder / "runs" / "job", "weights")
    assert [(line["epoch"], line["event"], line["kept"]) for line in found] == [
        (0, "", 1.0), (1, "updated", 1.0), (2, "pruned", 0.5), (3, "", 0.5),
    ]  # fmt: skip
    dense, left = found[0], found[-1]
    assert left["layers"] == {"blocks.0.mlp": 0.5, "blocks.1.mlp": 0.5} and left["weak"] == 0.5
    assert left["bytes"]["block"] == dense["bytes"]["dense"] // 2 < left["bytes"]["csr"]
    saved = 17 * 2 * 2 * 24 * 48  # tokens x blocks x layers x width x units
    assert dense["multiply_adds"] - left["multiply_adds"] == saved


def test_report_and_comparison_show_what_is_left(folder: Path) -> None:
    run = history(folder / "runs" / "job")
    row = next(row for row in summary(run).rows if row.what == "kept weights")
    assert row.value == "50.0 %" and " bytes of 37,632 dense" in row.note and "; 2 layers" in row.note
    assert (
        "Weights: admm keeps 0.5 of the units (per block) from epoch 2 on; a penalty" in (run.directory / "plan.md").read_text()
    )
    (shown,) = compare_page.rows(compare([folder / "runs" / "job"]))
    start, left = lines(run.directory, "start")[0], lines(run.directory, "weights")[-1]["bytes"]
    whole = 4 * start["parameters"] - left["dense"] + left["block"]  # of units no index is stored
    assert (shown["kept weights %"], shown["weights MB"]) == ("50", f"{whole / 1e6:.4g}") and not dense(run)
    assert sum(lines(run.directory, "weights")[-1]["layer_bytes"].values()) == left["block"]
    report = (run.directory / "report.md").read_text()
    assert f"| blocks.1.mlp | 50.0 % | {left['block'] // 2:,} |" in report and report.count("| blocks.") == 2
    assert f"; {whole:,} of the whole network" in row.note and lines(run.directory, "end")[-1]["weights_bytes"] == whole


def test_masks_of_another_run_are_refused_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    continued(folder / "runs" / "job", 10, "other")
    words = ["train", str(folder / "job.yaml"), f"runs={folder / 'runs'}", "name=other", "--resume", "weights.groups=heads"]
    assert main(words) == 2
    assert "weights.groups: checkpoint 'units', now 'heads'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights.keep=0"], "weights.keep=0: must be > 0 and <= 1"),
        (["weights.keep=1.1"], "weights.keep=1.1: must be > 0 and <= 1"),
        (["weights.prune=4ep"], "weights.prune=4ep with epochs=4: no group would be pruned; set weights.prune <= 3ep"),
        (["weights.start=2ep"], "weights.start='2ep': must be < weights.prune=2ep"),
        (["weights.rho=0"], "weights.rho=0: must be > 0"),
        (["weights.strength=0.1"], "weights.strength=0.1: not a setting of weights.method=admm; set weights.method=group_lasso"),
        (["weights.groups=columns", "weights.block=[16]"], "weights.block"),
        (["weights.method=lasso"], "weights.method='lasso': unknown value; valid values: all, magnitude, group_lasso, admm"),
        (["engine.kind=deepspeed", "engine.zero=1", "engine.precision=bf16"], "engine.precision=bf16 with weights.method=admm"),
    ],
)  # fmt: skip
def test_settings_are_refused_with_a_remedy(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(folder / "job.yaml", words)
    assert message in str(error.value)


def test_layers_that_do_not_exist_or_are_frozen_are_refused_by_name(folder: Path) -> None:
    config = load(folder / "job.yaml", ["weights.layers=[mpl]"])
    model = build_model(config)
    with pytest.raises(ConfigError, match=r"weights\.layers='mpl': fits no layer that can be pruned; did you mean mlp"):
        build_pruning(config, model)
    config = load(folder / "job.yaml", ["optim.freeze=1"])
    level = build_pruning(config, model)
    build_optimizer(model, config.optim)
    with pytest.raises(ConfigError, match=r"weights\.layers: blocks\.0\.mlp\.fc1\.bias is frozen by optim\.freeze"):
        refuse_frozen(level, model)


def test_training_leaves_two_of_each_four_neighbours_in_every_row(folder: Path) -> None:
    """The pattern of NVIDIA's sparse tensor cores, from the epoch of pruning to the last step."""
    settings = "weights={method: admm, keep: 0.5, groups: columns, block: [1, 4], start: 0ep, prune: 1ep}"
    words = ["train", str(folder / "job.yaml"), f"runs={folder / 'runs'}", "name=two_of_four", "epochs=2", settings]
    assert main([*words, "optim.warmup=0ep"]) == 0
    run = folder / "runs" / "two_of_four"
    assert [line["kept"] for line in lines(run, "weights")] == [1.0, 0.5] and len(seen(run)) == 8
    weights = load_file(max((run / "checkpoints").glob("step-*")) / "weights.safetensors")
    layers = [value for name, value in weights.items() if value.ndim == 2 and name.startswith("blocks.")]
    assert len(layers) == 8
    for value in layers:
        assert torch.equal(value.view(-1, 4).ne(0).sum(1), torch.full((value.numel() // 4,), 2))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pruned_weights_compose_with_densities_drawn_per_step(folder: Path, tmp_path: Path) -> None:
    """SaiT's plan on top of level 4: a resumed run is the uninterrupted one, and the compact file answers at every density."""
    tokens = [
        "tokens={method: topk, keep: 0.5, blocks: [0], position: block}",
        "plan={method: dense_sparse, densities: [0.5, 0.7]}",
    ]
    words = ["train", str(folder / "job.yaml"), f"runs={tmp_path}", "engine.kind=deepspeed", *tokens]
    assert main([*words, "name=whole"]) == 0
    whole = tmp_path / "whole"
    continued(whole, 5, "again")
    assert main([*words, "name=again", "--resume"]) == 0
    assert seen(tmp_path / "again") == {step: facts for step, facts in seen(whole).items() if step > 5}
    assert min(line["keep_tokens"] for line in lines(whole, "step")) < 0.9
    file = export(whole, tmp_path / "small.safetensors", form="compact").path
    masked, small = load_model(export(whole, tmp_path / "masked.safetensors").path), load_model(file)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for density in (1.0, 0.5):
        torch.testing.assert_close(small(images, density), masked(images, density), rtol=1e-4, atol=1e-5)
    assert file.stat().st_size < 0.8 * (tmp_path / "masked.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
def test_compiled_runs_prune_as_eager_ones_and_resume_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """DDP and ZeRO 1 on two processes: the penalty's step and the masks are outside of the compiled graphs."""
    shutil.copy(folder / "job.yaml", tmp_path)
    runs = [
        "eager",
        "ddp engine.compile=true",
        "zero engine.kind=deepspeed engine.zero=1 engine.compile=true",
    ]
    words = [str(ROOT / "tests" / "support" / "jobs" / "mechanisms.py"), "job.yaml", "10", *runs]
    done = subprocess.run(
        [sys.executable, *torchrun(2), *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stderr[-4000:]
    eager, layer = seen(tmp_path / "runs" / "eager"), "blocks.1.mlp.fc1.weight"
    for name in ("ddp", "zero"):
        whole, again = (seen(tmp_path / "runs" / one) for one in (name, f"{name}-resumed"))
        assert list(again) == list(range(11, 17)) and again == {step: whole[step] for step in again}
        np.testing.assert_allclose([one[0] for one in whole.values()], [one[0] for one in eager.values()], rtol=1e-4)
        ours, theirs = (
            load_file(tmp_path / "runs" / one / "checkpoints/step-00000016/weights.safetensors")[layer]
            for one in (name, "eager")
        )
        assert torch.equal(ours.ne(0), theirs.ne(0)) and int(ours.ne(0).any(1).sum()) == 48, "the same units"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["admm", "group_lasso", "magnitude"])
def test_every_mode_prunes_alike_and_resumes_bit_for_bit(folder: Path, method: str, tmp_path: Path) -> None:
    """DDP and ZeRO 0 to 3 on two processes, from the 10th step; then one process continues what two began."""
    shutil.copy(folder / "job.yaml", tmp_path)
    runs = [f"mode-{n} engine.kind=deepspeed engine.{mode} weights.method={method}" for n, mode in enumerate(MODES)]
    words = [str(ROOT / "tests" / "support" / "jobs" / "mechanisms.py"), "job.yaml", "10", *runs]
    done = subprocess.run(
        [sys.executable, *torchrun(2), *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first = seen(tmp_path / "runs" / "mode-0")
    for number in range(len(MODES)):
        whole, again = (seen(tmp_path / "runs" / name) for name in (f"mode-{number}", f"mode-{number}-resumed"))
        assert again == {key: whole[key] for key in range(11, 17)}
        if number < 5:
            np.testing.assert_allclose([one[0] for one in whole.values()], [one[0] for one in first.values()], rtol=1e-4)
        left = load_file(tmp_path / "runs" / f"mode-{number}" / "checkpoints" / "step-00000016" / "weights.safetensors")
        assert left["blocks.1.mlp.fc1.weight"].ne(0).any(1).sum() == 48
    continued(tmp_path / "runs" / "mode-4", 5, "alone")
    command = [
        "train",
        str(tmp_path / "job.yaml"),
        f"runs={tmp_path / 'runs'}",
        "name=alone",
        "--resume",
        f"weights.method={method}",
    ]
    assert main(command) == 0
    alone = seen(tmp_path / "runs" / "alone")
    np.testing.assert_allclose([one[0] for one in alone.values()], [first[key][0] for key in alone], rtol=1e-4)
