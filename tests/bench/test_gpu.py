"""`make gpu` in its tiny form on the CPU; on a GPU host the same code is the check."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsity import keyed_random
from trainer.bench.gpu import check


def test_every_device_path_agrees_with_itself_on_the_cpu(capsys: Any) -> None:
    assert check.main() == 0
    message = capsys.readouterr().out
    assert message.count("ok  ") >= 15 and "FAIL" not in message


def test_a_path_that_differs_is_found(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    true, calls = keyed_random.uniform, []

    def drifting(keys: torch.Tensor, *salts: int, **shape: Any) -> torch.Tensor:
        calls.append(keys)
        return true(keys, *salts, **shape) * 0.9 ** len(calls)

    monkeypatch.setattr(keyed_random, "uniform", drifting)
    assert check.main() == 1
    assert "FAIL  keyed uniform draws" in capsys.readouterr().out


@pytest.mark.gpu
def test_every_device_path_agrees_with_the_cpu() -> None:
    assert check.main() == 0
