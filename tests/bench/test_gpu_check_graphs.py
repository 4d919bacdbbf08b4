"""Rows of `make gpu PART=check` for compiled code, on the CPU: they hold, and a result that is off fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.bench.gpu import check_graphs
from trainer.bench.gpu.compared import deviation

CPU = torch.device("cpu")
DRAWN = {"compiled bf16, topk, exact", "compiled bf16 residual, topk, all"}


def test_of_several_results_the_worst_counts_and_nan_is_infinitely_far() -> None:
    one, off = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])
    assert deviation((one, one), (one, off), 0.3) == (0.25, 0.3) and deviation(one, one, 0.0).good
    assert deviation(one, torch.tensor([1.0, float("nan")]), 1e9).facts() == {
        "ok": False,
        "difference": float("inf"),
        "allowed": 1e9,
    }


def test_bf16_that_is_off_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first network of a row gives the exact numbers, the second is ours, the third the eager one beside it."""
    true, made = check_graphs.network, []

    def wrong(*given: Any, **settings: Any) -> Any:
        model = true(*given, **settings)
        made.append(model)
        if len(made) % 3 == 2:
            with torch.no_grad():
                model.network.head.weight.mul_(1.1)
        return model

    monkeypatch.setattr(check_graphs, "network", wrong)
    rows = dict(check_graphs.rows(CPU, compiled=False))
    found = rows["compiled bf16, topk, exact"]()
    assert not found["ok"] and found["error_of_eager"] > 2 and len(made) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_graphs_that_inductor_makes_for_the_cpu_hold() -> None:
    torch.compiler.reset()
    for name, row in check_graphs.rows(CPU, compiled=True):
        if not name.startswith("compiled") or name in DRAWN:
            assert (facts := row())["ok"], (name, facts)
    torch.compiler.reset()
