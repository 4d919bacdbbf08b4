"""`bench inference --forms`: a row for each form that the groups have, and the refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import images as drawn
from trainer.__main__ import main
from trainer.bench import pruned
from trainer.config.errors import ConfigError

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
        assert timm["peak_mib"] > 0 and floats["peak_mib"] is None
    assert of["units"]["2 x onnx"]["bytes"] < of["columns"]["2 x onnx"]["bytes"] - 10_000


def test_what_is_timed_computes_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: dict[str, torch.Tensor] = {}

    def forward(rows: Any, images: torch.Tensor, *others: Any) -> dict[str, Any]:
        with torch.no_grad():
            timed.update({name: row.run(images) for name, row in rows.items()})
        return {}

    monkeypatch.setattr(pruned, "measured", forward)
    for groups, form in (("units", "compact"), ("heads", "compact"), ("columns", "block")):
        pruned.bench(config(groups=groups), ["dense", form], [2], rounds=1)
        assert set(timed) == {"timm", form} and timed["timm"].std() > 0.01
        torch.testing.assert_close(timed.pop(form), timed.pop("timm"), rtol=1e-4, atol=1e-5)


def test_the_command_and_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(config(groups="heads").resolved()))
    assert main(["bench", "inference", "c.yaml", "--forms", "compact", "--batches", "2", "--rounds", "2"]) == 0
    assert "weights.groups=heads" in capsys.readouterr().out
    for settings, forms, words in (
        ({}, ["csr"], "--forms: unknown value 'csr'; valid values: dense, compact, block, onnx, onnx_int8"),
        ({}, ["compact"], "columns and rows of blocks leave no smaller dense layer"),
        ({"groups": "units"}, ["block"], "units and heads have no blocks; use the compact form"),
        ({"keep": 1.0}, ["block"], "--forms with weights.method=magnitude: nothing is pruned; set weights.keep below 1"),
    ):
        with pytest.raises(ConfigError) as error:
            pruned.bench(config(**settings), forms, [1], 1)
        assert words in str(error.value)
