"""Which attention kernel a run uses: the fastest that was measured, a fixed one, or torch's choice; on a CPU nothing is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from sparsity.build import build
from sparsity.types import Plan
from tests.support.vits import tiny
from trainer.config.run_config import EngineConfig
from trainer.data.order import BatchSplit
from trainer.engine import engine as module
from trainer.engine.attention_backend import BACKENDS, measured, using
from trainer.engine.engine import Engine
from trainer.engine.processes import Processes

CPU = torch.device("cpu")


def engine_of(on_gpu: bool, **settings: Any) -> Any:
    engine: Any = Engine.__new__(Engine)
    Processes.__init__(engine)
    engine.settings, engine.on_gpu, engine.batch_split = EngineConfig(**settings), on_gpu, BatchSplit(4, 1, 4)
    engine.attention = None
    return engine


def test_auto_takes_the_fastest_of_those_that_run_and_names_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    times = {"flash": 2.0, "cudnn": 1.0}  # the memory-efficient kernel did not take the input
    monkeypatch.setattr(module, "measured", lambda *given: asked.append(given) or times)
    engine = engine_of(on_gpu=True)
    assert engine.choose_attention([(6, 197, 64)]) == {"attention": "cudnn", "attention_ms": times}
    assert engine.attention == "cudnn" and asked == [(CPU, 4, [(6, 197, 64)], torch.bfloat16)]


@pytest.mark.parametrize(
    ("on_gpu", "settings", "chosen"),
    [
        (False, {}, None),
        (True, {"precision": "float32"}, None),  # cuDNN and flash attention take no float32
        (True, {"attention": "torch"}, None),
        (True, {"attention": "efficient"}, "efficient"),
        (False, {"attention": "math"}, "math"),
    ],
)
def test_nothing_is_measured_where_the_setting_or_a_cpu_decides(
    on_gpu: bool, settings: dict[str, Any], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measured", lambda *given: pytest.fail("measured"))
    engine = engine_of(on_gpu, **settings)
    assert engine.choose_attention([(6, 197, 64)]) == {"attention": chosen or "torch"} and engine.attention == chosen


def test_a_network_without_such_attention_is_left_to_torch() -> None:
    assert engine_of(on_gpu=True).choose_attention([]) == {"attention": "torch"}


def test_measuring_runs_forward_and_backward_and_leaves_the_random_numbers() -> None:
    before = torch.get_rng_state()
    found = measured(CPU, 2, [(2, 5, 8), (2, 5, 8), (2, 3, 8)], torch.float32)
    assert set(found) <= {"flash", "math"} and "math" in found and min(found.values()) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_backend_comes_first_and_what_it_does_not_take_goes_to_the_next() -> None:
    x = torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    plain = scaled_dot_product_attention(x, x, x)
    for name in [*BACKENDS, None]:
        with using(name):
            torch.testing.assert_close(scaled_dot_product_attention(x, x, x), plain)
            assert scaled_dot_product_attention(x, x, x, attn_mask=mask).isfinite().all()
    from torch.nn.attention import _cur_sdpa_kernel_backends

    with using("efficient"):
        assert _cur_sdpa_kernel_backends(with_priority=True)[0] == SDPBackend.EFFICIENT_ATTENTION


def test_shapes_follow_the_plan() -> None:
    model = build(tiny(), tokens="topk", blocks=(1,))
    assert model.attention_shapes() == ((3, 17, 8),) * 3
    assert model.attention_shapes(Plan(0.5)) == ((3, 17, 8), (3, 17, 8), (3, 9, 8))
