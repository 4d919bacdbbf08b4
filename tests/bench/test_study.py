"""`bench study`: one row per computation, shared by the arms that compute the same, and the schedule of each arm in rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_step import RECIPE
from trainer.__main__ import main
from trainer.analysis.study import step_times
from trainer.analysis.study.file import read
from trainer.bench import study

STUDY = """
name: mini
question: What does a step take?
config: job.yaml
reference: dense
settings: {tokens: {method: all}, connections: {method: all}, plan: {method: constant}}
arms:
  dense: {}
  fewer_examples: {examples.removed: 0.25}
  topk:
    tokens: {method: topk, keep: 0.5, blocks: [1, 2]}
    plan: {method: staircase, stairs: [[2ep, 0.8, 1.0], [4ep, 0.5, 1.0]]}
  topk_again:
    epochs: 6
    tokens: {method: topk, keep: 0.5, blocks: [1, 2]}
    plan: {method: staircase, stairs: [[2ep, 0.5, 1.0]]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(RECIPE)
    Path("mini.yaml").write_text(STUDY)
    return tmp_path


def test_arms_that_compute_the_same_share_a_row(here: Path, capsys: Any) -> None:
    Path("mini").mkdir()
    assert main(["bench", "study", "mini.yaml", "--rounds", "2", "--json", "mini/step_times.json"]) == 0
    facts = json.loads(Path("mini/step_times.json").read_text())
    arms, measured = facts.pop("arms"), facts.pop("measured")
    assert set(facts) == {"dense", "topk 1: epochs 2 - 4", "topk 2: epochs 4 - 10"}
    assert arms["dense"] == arms["fewer_examples"] == [[0, 10, 1, "dense"]]
    assert arms["topk"] == [[0, 2, 1, "dense"], [2, 4, 1, "topk 1: epochs 2 - 4"], [4, 10, 1, "topk 2: epochs 4 - 10"]]
    assert arms["topk_again"] == [[0, 2, 1, "dense"], [2, 6, 1, "topk 2: epochs 4 - 10"]]
    assert facts["dense"]["ratio"] == 1 > facts["topk 1: epochs 2 - 4"]["share"] > facts["topk 2: epochs 4 - 10"]["share"]
    assert measured["batch"] == 8 and measured["rounds"] == 2 and measured["threads"] >= 1
    kept = step_times.read(Path("mini"))
    assert kept and kept.rows == {name: row["ratio"] for name, row in facts.items()} and kept.arms == arms
    assert "mini: 4 arms, 3 computations, batch 8, 32 px, 2 rounds" in capsys.readouterr().out


def test_a_dense_arm_of_another_engine_has_a_row_of_its_own(here: Path) -> None:
    Path("mini.yaml").write_text(STUDY.replace("{examples.removed: 0.25}", "{engine.compile: true}"))
    study_file = read("mini.yaml")
    configs = {arm: study._config(study_file, arm) for arm in ("dense", "fewer_examples")}
    rows, schedules = study._rows(configs, "dense")
    assert set(rows) == {"dense", "fewer_examples 0: epochs 0 - 10"} == {row for ((*_, row),) in schedules.values()}


@pytest.mark.parametrize(
    ("old", "new", "words", "expected"),
    [
        ("", "", ["--arms", "dens"], "--arms dens: unknown arm; valid values: dense, fewer_examples, topk, topk_again"),
        ("examples.removed: 0.25", "data.batch: 16", [], "fewer_examples: data.batch=16: cannot be timed beside dense with 8"),
        ("examples.removed: 0.25", "data.micro_batch: 4", [], "fewer_examples: data.micro_batch=4: cannot be timed beside dense with 8"),
        ("examples.removed: 0.25", "weights: {method: magnitude}", [], "fewer_examples: weights.method=magnitude: cannot be timed"),
        ("examples.removed: 0.25", "optim.name: sgd", [], "fewer_examples: optim.name=sgd: cannot be timed beside dense with adamw"),
        ("", "", ["--rounds", "0"], "bench study: --rounds 0: must be >= 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    here: Path, capsys: Any, old: str, new: str, words: list[str], expected: str
) -> None:
    Path("mini.yaml").write_text(STUDY.replace(old, new) if old else STUDY)
    assert main(["bench", "study", "mini.yaml", *words]) != 0
    assert expected in capsys.readouterr().err
