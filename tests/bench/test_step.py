"""`bench step`: every plan of the run beside dense and timm, ratios with their intervals, and the whole run by the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsity.types import DENSE
from tests.conftest import ROOT
from trainer.__main__ import main
from trainer.bench.paired import TimedPlan, interval, paired
from trainer.bench.step import bench
from trainer.config.load import load, parse
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


SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "args": {"patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": [1, 1, 4, 1], "num_heads": [1, 2, 2, 2]},
}
CONVNEXT = {"name": "convnext_atto", "args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}}


def test_rows_of_a_swin_and_of_a_network_without_tokens(tmp_path: Path) -> None:
    """The share of the time stands beside that of the multiply-adds, dense with our seams beside timm; level 1 keeps the same books for
    each network."""
    (tmp_path / "job.yaml").write_text(RECIPE)
    levels: Any = {"tokens": {"method": "all"}, "connections": {"method": "all"}, "plan": {"method": "constant"}}
    examples = {"method": "forgetting", "removed": 0.2, "ties": "id", "window": "3ep", "updates": 2}
    stage: Any = {"tokens": {"method": "topk", "keep": 0.5, "blocks": [2, 3], "position": "block"}}
    found: dict[str, Any] = {}
    for name, model, own in (("deit", {}, {}), ("swin", SWIN, stage), ("convnext", CONVNEXT, {})):
        config = parse(load(tmp_path / "job.yaml").resolved() | levels | own | {"examples": examples})
        config = config.changed(model={"args": {}} | model if model else {})
        found[name] = config, bench(config, pairs=2)
    for name, (config, result) in found.items():
        assert {"ours", "against", "timm"} <= set(result.rows), name
        model = build_model(config)
        shares = [cost_of(model, plan)["multiply_adds"] for plan in (build_schedule(config).last(), DENSE)]
        assert result.rows["ours"]["share"] == pytest.approx(shares[0] / shares[1]) and (shares[0] < shares[1]) == (
            name == "swin"
        )
        assert (
            result.rows["timm"]["share"] == 1
            and result.rows["against"]["of_timm"] > 0
            and "against / timm: " in result.notes[0]
        )
        assert result.beside["run"]["bound"] == pytest.approx(
            0.8 * shares[0] / shares[1], abs=0.05
        )  # and a fifth of the examples
    books = [result.beside["bookkeeping"] for _, result in found.values()]
    assert all(book["megabytes"] == books[0]["megabytes"] and 0 < book["median"] < 100 for book in books)


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
