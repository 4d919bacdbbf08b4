"""`bench inference --forms`: a row for each form that the groups have, and the refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from tests.support import images as drawn
from trainer.__main__ import main
from trainer.bench import bsr, paired, pruned
from trainer.bench import forms as built
from trainer.checkpoint.export_onnx import export_onnx
from trainer.checkpoint.save_load import save_checkpoint
from trainer.checkpoint.state import TrainState
from trainer.config.errors import ConfigError
from trainer.data.shards.index import build_index

MODEL = {"image_size": 32, "args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}}


def config(**weights: Any) -> Any:
    return drawn.config("nowhere", weights={"method": "magnitude", "keep": 0.5, "prune": "0ep"} | weights).changed(model=MODEL)


def test_every_form_is_measured_beside_timm() -> None:
    for form, groups in (("block", "columns"), ("compact", "units")):
        found = pruned.bench(config(groups=groups), ["dense", form], [2], rounds=2)
        assert list(found.rows) == ["2 x timm", f"2 x {form}"] and "blocks " in found.notes[1]
        row = found.rows[f"2 x {form}"]
        assert row["images_per_second"] > 0 and row["bound"] > 1.2 and row["gmacs"] < found.rows["2 x timm"]["gmacs"]


def test_onnx_rows_are_the_smaller_network_where_there_is_one_and_int8_has_fewer_bytes() -> None:
    of = {
        groups: pruned.bench(config(groups=groups), ["onnx", "onnx_int8"], [2], rounds=2).rows
        for groups in ("units", "columns")
    }
    for groups, rows in of.items():
        timm, floats, int8 = (rows[f"2 x {name}"] for name in ("timm", "onnx", "onnx_int8"))
        assert (floats["gmacs"] < timm["gmacs"]) == (groups == "units") and int8["gmacs"] == floats["gmacs"]
        assert int8["bytes"] < 0.8 * floats["bytes"], "the graph itself, 100 kB, stays"
        assert timm["peak_mib"] > 0 and floats["peak_mib"] >= 0
    assert of["units"]["2 x onnx"]["bytes"] < of["columns"]["2 x onnx"]["bytes"] - 10_000


def test_what_is_timed_computes_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: dict[str, torch.Tensor] = {}

    def forward(rows: Any, images: torch.Tensor, *others: Any) -> dict[str, Any]:
        with torch.no_grad():
            timed.update({name: row.run(images) for name, row in rows.items()})
        return {}

    monkeypatch.setattr(pruned, "measured", forward)
    for groups, form in (("units", "compact"), ("heads", "compact"), ("columns", "block"), ("units", "onnx")):
        pruned.bench(config(groups=groups), ["dense", form], [2], rounds=1)
        assert set(timed) == {"timm", form} and timed["timm"].std() > 0.01
        torch.testing.assert_close(timed.pop(form), timed.pop("timm"), rtol=1e-4, atol=1e-5)


def test_the_command_and_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(config(groups="heads").resolved()))
    assert main(["bench", "inference", "c.yaml", "--forms", "compact", "--batches", "2", "--rounds", "2"]) == 0
    assert "weights.groups=heads" in capsys.readouterr().out
    for settings, forms, words in (
        ({}, ["csr"], "--forms: unknown value 'csr'; valid values: dense, compact, block, bsr, 2:4, onnx, onnx_int8"),
        (
            {},
            ["compact"],
            "columns and rows of blocks leave no smaller dense layer; valid forms of these groups: dense, block, bsr,",
        ),
        ({"groups": "units"}, ["block"], "units and heads have no blocks; use the compact form"),
        ({"groups": "units"}, ["bsr"], "units and heads have no blocks; use the compact form"),
        ({"block": [32, 32]}, ["bsr"], "bsr: blocks of 32 x 32 do not divide a layer of 144 x 48; set weights.block"),
        (
            {"block": [16, 48]},
            ["bsr"],
            "bsr: blocks of 16 x 48 are not square, which torch needs on a CPU; set weights.block=[16, 16]",
        ),
        ({"keep": 1.0}, ["block"], "--forms with weights.method=magnitude: nothing is pruned; set weights.keep below 1"),
    ):
        with pytest.raises(ConfigError) as error:
            pruned.bench(config(**settings), forms, [1], 1)
        assert words in str(error.value)
    (tmp_path / "empty").mkdir()
    Path("empty/config.yaml").write_text(Path("c.yaml").read_text())
    for words, message in (
        (["c.yaml", "--against", "timm:vit_tiny_patch16_224"], "compares forms of pruned weights; add --forms"),
        (["c.yaml", "--forms", "compact", "--against", "vit"], "--against vit: must be timm:NAME"),
        (["c.yaml", "--forms", "compact", "--against", "timm:resnet18"], "--against timm:resnet18: "),
        (["empty", "--forms", "compact"], "bench inference empty --forms: no checkpoint in it"),
    ):
        assert main(["bench", "inference", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run with a checkpoint of pruned weights, and shards of 16 and 8 images."""
    patterns = [
        drawn.write_shards(tmp_path / "shards", [count], stem=stem) for stem, count in (("train", 16), ("validation", 8))
    ]
    for pattern in patterns:
        build_index(pattern, progress=False)
    settings = config(groups="columns", block=[16, 16]).changed(data={"train": patterns[0], "validation": patterns[1]})
    found = built.of_config(settings)
    with torch.no_grad():  # a head without weights would answer every image alike
        found.vit.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "run"
    parts = {"optimizer": {}, "ema": {}, "examples": {}, "selection": None, "pruning": found.level.state_dict()}
    save_checkpoint(folder / "checkpoints", TrainState(step=1), settings, "shards", weights=found.vit.state_dict(), **parts)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.resolved()))
    return folder


def test_the_forms_of_a_run_have_its_answers_beside_another_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = ["dense", "block", "bsr", "onnx", "onnx_int8"]
    monkeypatch.setattr(pruned, "CALIBRATED", 4)
    found = pruned.bench(run, forms, [2], 1, "timm:vit_tiny_patch16_224", ["evaluate.batch=5"])
    rows = {name.removeprefix("2 x "): facts for name, facts in found.rows.items()}
    assert list(rows) == ["timm", *forms] and {"top1", "agreement"}.isdisjoint(rows["timm"].keys() | rows["bsr"].keys())
    assert rows["dense"]["agreement"] == 100.0 and rows["dense"]["difference"] == 0.0
    for form in ("block", "onnx"):
        assert rows[form]["top1"] == rows["dense"]["top1"] and rows[form]["difference"] < 1e-4
    assert rows["onnx_int8"]["difference"] > 1e-4 and rows["onnx_int8"]["agreement"] >= 50.0
    assert rows["timm"]["gmacs"] > 2 * rows["dense"]["gmacs"] and rows["block"]["bytes"] < rows["dense"]["bytes"]
    right = [int((built.of_run(run).vit(pixels).argmax(1) == labels).sum()) for pixels, labels in _images(run)]
    assert rows["dense"]["top1"] == 100 * sum(right) / 8
    stored = load_file(next(run.glob("checkpoints/step-*")) / "weights.safetensors")
    torch.testing.assert_close(built.of_run(run).vit.head.weight.data, stored["head.weight"], rtol=0, atol=0)
    for fixed in ("weights.groups=rows", "model.args.depth=1"):
        with pytest.raises(ConfigError, match=f"{fixed}: the checkpoint has the masks and layers of its run"):
            built.of_run(run, [fixed])
    assert "energy: not measured" in found.notes[-1] or rows["timm"]["joules"] is not None


@pytest.mark.slow
def test_the_onnx_files_are_those_that_export_writes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruned, "CALIBRATED", 4)
    monkeypatch.setattr(pruned, "_answers", lambda *given: {})
    rows = pruned.bench(run, ["onnx", "onnx_int8"], [1], 1, None, ["evaluate.batch=5"]).rows
    for name, calibration in (("onnx", None), ("onnx_int8", 4)):
        file = export_onnx(run, run.parent / f"{name}.onnx", 1.0, calibration=calibration).path
        assert rows[f"1 x {name}"]["bytes"] == file.stat().st_size, name


def _images(run: Path) -> Any:
    return pruned._labelled(built.of_run(run).config, torch.device("cpu"))


def test_bsr_keeps_the_heaviest_whole_blocks_and_computes_their_product() -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    kept = bsr.whole_blocks(weight, (16, 16), 0.5)
    sums = np.array([[float((weight[r : r + 16, c : c + 16] ** 2).sum()) for c in (0, 16, 32)] for r in (0, 16)])
    assert kept.sum() == 3 and sums[kept.numpy()].min() > sums[~kept.numpy()].max()
    masked = weight * kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
    x, bias = torch.randn(2, 5, 48), torch.randn(32)
    with torch.inference_mode():
        found = bsr.BsrLinear(masked.to_sparse_bsr((16, 16)), nn.Parameter(bias))(x)
    torch.testing.assert_close(found, x @ masked.T + bias, rtol=1e-5, atol=1e-5)


def test_the_peak_of_the_process_is_that_of_the_call() -> None:
    peak = paired.resident_peak(lambda: np.ones(8_000_000).sum())
    assert peak is None or 60e6 < peak < 80e6
