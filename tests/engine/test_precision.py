"""The network outside of DeepSpeed and DDP computes in the run's precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config.schema_run import EngineConfig
from trainer.engine.engine import Engine


@pytest.mark.parametrize(
    ("precision", "images", "product"),
    [
        ("float32", torch.float32, torch.float32),
        ("autocast", torch.float32, torch.bfloat16),
        ("bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_dense_baseline_computes_in_the_precision_of_the_run(
    precision: str, images: torch.dtype, product: torch.dtype
) -> None:
    """Without autocast the dense passes of an autocast run were float32: slower than the run's own, a speedup that is none."""
    engine: Any = SimpleNamespace(settings=EngineConfig(precision=precision), device=torch.device("cpu"), attention=None)
    layer = torch.nn.Linear(4, 4)
    layer = layer.to(torch.bfloat16) if precision == "bf16" else layer
    given: list[torch.dtype] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        given.append(x.dtype)
        return layer(x)

    assert Engine.forward_unwrapped(engine, network, torch.zeros(2, 4)).dtype == product  # pyright: ignore[reportArgumentType]
    assert given == [images]
