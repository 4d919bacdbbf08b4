"""`make gpu` in its tiny form on the CPU; on a GPU host the same code is the check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsity import keyed_random
from trainer.bench import gpu


def test_every_device_path_agrees_with_itself_on_the_cpu(capsys: Any) -> None:
    assert gpu.main(["check"]) == 0
    said = capsys.readouterr().out
    assert said.count("ok  ") >= 15 and "FAIL" not in said


def test_a_path_that_differs_is_found(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    true, calls = keyed_random.uniform, []

    def drifting(keys: torch.Tensor, *salts: int, **shape: Any) -> torch.Tensor:
        calls.append(keys)
        return true(keys, *salts, **shape) * 0.9 ** len(calls)

    monkeypatch.setattr(keyed_random, "uniform", drifting)
    assert gpu.main(["check"]) == 1
    assert "FAIL  keyed uniform draws" in capsys.readouterr().out


def test_step_times_are_paired_ratios(tmp_path: Path, capsys: Any) -> None:
    assert gpu.main(["step", "--tiny", "--json", str(tmp_path / "step.json")]) == 0
    rows = json.loads((tmp_path / "step.json").read_text())
    assert rows.pop("bookkeeping")["examples"] == 1_281_167
    assert {"timm", "ours", "tokens 0.7"} <= rows.keys() and rows["timm"]["ratio"] == 1.0
    assert all(row["min"] <= row["median"] <= row["max"] and row["unit"] == "ms" for row in rows.values())
    assert "images/s" in capsys.readouterr().out


@pytest.mark.gpu
def test_every_device_path_agrees_with_the_cpu() -> None:
    assert gpu.main(["check"]) == 0
