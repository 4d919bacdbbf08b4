"""`bench step`: every plan of the run beside dense and timm, ratios with their intervals, and the whole run by the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from trainer.__main__ import main
from trainer.bench.paired import TimedPlan, interval, paired
from trainer.config.load import load
from trainer.config.schema_levels import ConnectionsConfig
from trainer.model.build import build_model, build_schedule, cost_of

RECIPE = """
name: job
epochs: 10
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32, args: {patch_size: 4, embed_dim: 48, depth: 4, num_heads: 3}}
data: {train: nowhere, validation: nowhere, batch: 8, micro_batch: 8, lanes: 4}
examples: {method: random_epoch, removed: 0.5, anneal: 0.2}
tokens: {method: topk, keep: 0.5, blocks: [1, 2]}
connections: {method: shared_keys, keep: 0.5}
plan: {method: staircase, stairs: [[2ep, 0.8, 1.0], [4ep, 0.5, 0.5]]}
engine: {precision: float32}
"""


def test_rows_ratios_shares_and_the_whole_run(tmp_path: Path, capsys: Any) -> None:
    config, out = tmp_path / "job.yaml", tmp_path / "step.json"
    config.write_text(RECIPE)
    assert main(["bench", "step", str(config), "--pairs", "6", "--json", str(out)]) == 0
    rows, message = json.loads(out.read_text()), capsys.readouterr().out
    run, counting = rows.pop("run"), rows.pop("bookkeeping")
    assert 0 < counting["min"] <= counting["median"] and counting["megabytes"] < 20, counting
    assert f"bookkeeping of examples (random_epoch): {counting['median']:.3f} ms per step" in message
    assert set(rows) == {"ours", "ours from epoch 0", "ours from epoch 2", "against", "timm"} and "whole run:" in message
    assert all(row["unit"] == "ms" and 0 < row["min"] <= row["median"] <= row["max"] for row in rows.values())
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows.values())
    assert rows["against"]["ratio"] == 1.0 == rows["timm"]["share"] == rows["ours from epoch 0"]["share"]
    assert rows["timm"]["of_timm"] == 1.0 and rows["ours"]["of_timm_interval"][0] <= rows["ours"]["of_timm"]
    assert rows["ours"]["share"] < rows["ours from epoch 2"]["share"] < 1
    assert rows["ours"]["peak_mib"] < rows["ours from epoch 2"]["peak_mib"] < rows["against"]["peak_mib"]
    # epochs 0-2 dense, 2-4 at .8, 4-10 at the end; half of the examples but in the last two epochs, which show all
    shares = [rows[name]["share"] for name in ("ours from epoch 0", "ours from epoch 2", "ours")]
    assert run["bound"] == pytest.approx((2 * 0.5 * shares[0] + 2 * 0.5 * shares[1] + (4 * 0.5 + 2) * shares[2]) / 10)
    assert run["min"] <= run["median"] <= run["max"] and run["note"] == "", "random_epoch is known before the run"


@pytest.mark.parametrize(("ratio", "bound"), [("0.9", 0.804), ("0.8", 0.639), ("0.7", 0.575)])
def test_bounds_of_the_published_recipes(ratio: str, bound: float) -> None:
    """docs/methods.md, section Cost: the whole run of DeiT-S with warm-up, cosine and the examples removed."""
    config = load(ROOT / "configs" / f"tri_level_deit_small_{ratio}.yaml")
    with torch.device("meta"):
        model = build_model(config.changed(connections=ConnectionsConfig()))
    schedule = build_schedule(config)
    dense = cost_of(model, schedule.stretches()[0].plan)["multiply_adds"]
    assert schedule.mean(lambda plan: cost_of(model, plan)["multiply_adds"] / dense) == pytest.approx(bound, abs=2e-3)


def test_the_interval_of_a_median() -> None:
    values = [float(n) for n in range(1, 31)]
    assert interval(values[::-1]) == (10.0, 21.0)  # the sign test's table: n = 30, 95 %
    assert interval(values[:5]) == (1.0, 5.0) and interval(values[:6]) == (1.0, 6.0)


def test_every_round_runs_every_row_and_networks_are_shared() -> None:
    calls: list[str] = []

    class Counted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            return super().forward(x.flatten(1))

    def network(name: str) -> Counted:
        made = Counted(12, 3)
        made.name = name
        return made

    rows = {"a": TimedPlan(network("a")), "b": TimedPlan(network("b"))}
    paired(rows, torch.device("cpu"), 2, 2, 12, base="a", optimizer=lambda network: torch.optim.SGD(network.parameters()))
    rounds = [calls[-24:][i : i + 2] for i in range(0, 24, 2)]
    assert all(sorted(one) == ["a", "b"] for one in rounds) and ["a", "b"] in rounds and ["b", "a"] in rounds
