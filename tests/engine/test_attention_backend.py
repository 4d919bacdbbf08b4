"""Which attention kernel a run uses: for each of its token counts the fastest that was measured, a fixed one, or torch's choice; on a CPU
nothing is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.functional import scaled_dot_product_attention

from sparsity.attention_kernel import BACKENDS, AttentionShape, using
from sparsity.build import build
from sparsity.tokens.tome import MergeSettings
from sparsity.types import DENSE, Plan
from tests.support.vits import images, tiny
from trainer.config.run_config import EngineConfig
from trainer.data.order import BatchSplit
from trainer.engine import attention_backend
from trainer.engine import engine as module
from trainer.engine.attention_backend import facts, fastest, measured
from trainer.engine.engine import Engine
from trainer.engine.processes import Processes

CPU = torch.device("cpu")
DENSE_SHAPE, FEWER, HIDDEN = AttentionShape(6, 197, 64), AttentionShape(6, 139, 64), AttentionShape(6, 139, 64, hides=True)


def engine_of(on_gpu: bool, **settings: Any) -> Any:
    engine: Any = Engine.__new__(Engine)
    Processes.__init__(engine)
    engine.settings, engine.on_gpu, engine.batch_split = EngineConfig(**settings), on_gpu, BatchSplit(4, 1, 4)
    engine.attention = None
    engine.device_name = lambda: "NVIDIA H200"
    return engine


def test_auto_takes_the_fastest_at_each_count_and_names_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    times = {
        DENSE_SHAPE: {"flash": 2.0, "cudnn": 1.0, "efficient": 3.0},
        FEWER: {"flash": 1.0, "cudnn": 1.5},
        HIDDEN: {"cudnn": 2.0, "efficient": 1.75},  # flash attention did not take the mask
    }
    monkeypatch.setattr(module, "measured", lambda *given: asked.append(given) or times)
    engine = engine_of(on_gpu=True)
    kernels, fields = engine.choose_attention(iter([DENSE_SHAPE, FEWER, HIDDEN]))
    assert asked == [(CPU, 4, [DENSE_SHAPE, FEWER, HIDDEN], torch.bfloat16)] and engine.attention is None
    assert kernels == {(197, False): "cudnn", (139, False): "flash", (139, True): "efficient"}
    assert fields == {
        "attention": {"139": "flash", "139 masked": "efficient", "197": "cudnn"},
        "attention_ms": {"139": times[FEWER], "139 masked": times[HIDDEN], "197": times[DENSE_SHAPE]},
    }


def test_a_resume_keeps_the_kernels_of_the_attempt_before_and_times_only_other_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {DENSE_SHAPE.kind: "efficient", (98, False): "flash"}
    monkeypatch.setattr(module, "measured", lambda *given: pytest.fail("measured"))
    kernels, fields = engine_of(on_gpu=True).choose_attention([DENSE_SHAPE], before)
    assert kernels == before and fields["attention"] == {"98": "flash", "197": "efficient"}

    asked: list[Any] = []
    monkeypatch.setattr(module, "measured", lambda *given: asked.append(given[2]) or {FEWER: {"cudnn": 1.0}})
    kernels, _ = engine_of(on_gpu=True).choose_attention([DENSE_SHAPE, FEWER], before)
    assert asked == [[FEWER]] and kernels == before | {FEWER.kind: "cudnn"}
    assert engine_of(on_gpu=False).choose_attention([DENSE_SHAPE], before)[0] == {}


def test_a_resume_on_another_gpu_times_all_kernels_anew_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "measured", lambda *given: asked.append(given[2]) or {DENSE_SHAPE: {"cudnn": 1.0}})
    before, engine = {DENSE_SHAPE.kind: "flash", (98, False): "efficient"}, engine_of(on_gpu=True)
    for same in ("NVIDIA H200", ""):  # empty: of a checkpoint from before the name was kept
        kernels, fields = engine.choose_attention([DENSE_SHAPE], before, same)
        assert kernels == before and "warnings" not in fields and not asked
    kernels, fields = engine.choose_attention([DENSE_SHAPE], before, "NVIDIA A100")
    assert kernels == {DENSE_SHAPE.kind: "cudnn"} and asked == [[DENSE_SHAPE]]
    (text,) = fields["warnings"]
    assert "timed anew on NVIDIA H200" in text and "NVIDIA A100 (98: efficient, 197: flash)" in text


def test_a_count_that_was_not_timed_takes_the_backend_of_the_nearest() -> None:
    times = {DENSE_SHAPE: {"flash": 2.0, "cudnn": 1.0}, AttentionShape(6, 69, 64): {"flash": 1.0, "cudnn": 2.0}}
    near, masked = AttentionShape(6, 98, 64), AttentionShape(6, 98, 64, hides=True)
    kernels = fastest(times, [*times, near, AttentionShape(6, 161, 64), masked])
    assert kernels == {(197, False): "cudnn", (69, False): "flash", (98, False): "flash", (161, False): "cudnn"}
    one = fastest({DENSE_SHAPE: {"flash": 1.0}}, [DENSE_SHAPE, near])
    assert facts({DENSE_SHAPE: {"flash": 1.0}}, one) == {"attention": "flash", "attention_ms": {"197": {"flash": 1.0}}}


def test_of_many_counts_some_are_timed_the_smallest_and_the_largest_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backend, "MOST", 3)
    monkeypatch.setattr(attention_backend, "_milliseconds", lambda *given: 1.0)
    shapes = [AttentionShape(2, tokens, 8, hides) for tokens in range(10, 30) for hides in (False, True)]
    timed = [(shape.tokens, shape.masked) for shape in measured(CPU, 2, shapes[::-1] * 2, torch.float32)]
    assert timed == [(10, False), (20, False), (29, False), (10, True), (20, True), (29, True)]


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
    assert engine.choose_attention([DENSE_SHAPE]) == ({}, {"attention": chosen or "torch"}) and engine.attention == chosen


def test_a_network_without_such_attention_is_left_to_torch() -> None:
    assert engine_of(on_gpu=True).choose_attention([]) == ({}, {"attention": "torch"})


def test_measuring_runs_forward_and_backward_and_leaves_the_random_numbers() -> None:
    before = torch.get_rng_state()
    shapes = [AttentionShape(2, 5, 8), AttentionShape(2, 3, 8), AttentionShape(2, 3, 8, hides=True)]
    found = measured(CPU, 2, [*shapes, shapes[0]], torch.float32)
    assert set(found) == set(shapes)
    for times in found.values():
        assert "math" in times and set(times) <= {"flash", "math"} and min(times.values()) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_backend_comes_first_and_what_it_does_not_take_goes_to_the_next() -> None:
    x = torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    plain = scaled_dot_product_attention(x, x, x)
    for name in [*BACKENDS, None]:
        with using(name):
            torch.testing.assert_close(scaled_dot_product_attention(x, x, x), plain)
            assert scaled_dot_product_attention(x, x, x, attn_mask=mask).isfinite().all()

    with using("efficient"):
        assert _cur_sdpa_kernel_backends(with_priority=True)[0] == SDPBackend.EFFICIENT_ATTENTION


def test_shapes_follow_the_plan_and_name_masks() -> None:
    whole, half = AttentionShape(3, 17, 8), AttentionShape(3, 9, 8)
    hidden = half._replace(hides=True)
    topk, keys, exact = (
        build(tiny(), tokens="topk", connections=name, blocks=(1,)) for name in ("all", "shared_keys", "exact")
    )
    merging = build(tiny(), tokens=MergeSettings(merged=2), blocks=(0, 1))
    assert topk.attention_shapes() == exact.attention_shapes() == merging.attention_shapes() == (whole,) * 3
    assert topk.attention_shapes(Plan(0.5)) == keys.attention_shapes(Plan(0.5, 0.5)) == (whole, whole, half)
    assert exact.attention_shapes(Plan(0.5)) == (whole, whole, half) and exact.attention_shapes(Plan(0.5, 0.5)) == (
        whole,
        whole,
        hidden,
    )
    assert [(one.tokens, one.weighs) for one in merging.attention_shapes(Plan(0.5))] == [(17, False), (15, True), (13, True)]


def test_shapes_are_those_that_the_network_asks_kernels_for() -> None:
    """Every attention of a pass finds its choice: none has another count or mask than in `attention_shapes`."""

    class Asked(dict[tuple[int, bool], str]):
        def get(self, kind: Any, default: Any = None) -> Any:
            asked.append(kind)
            return default

    every: list[dict[str, Any]] = [
        {"tokens": "topk", "connections": "exact"}, {"tokens": MergeSettings(merged=2)}, {"tokens": "topk", "connections": "shared_keys"},
    ]  # fmt: skip
    for settings in every:
        asked: list[Any] = []
        model = build(tiny(), blocks=(0, 1), **settings)
        model.kernels = Asked()
        for plan in (DENSE, Plan(0.6, 0.4), Plan(0.6)):
            asked.clear()
            model(images(model.network, 2), plan)
            assert asked == [shape.kind for shape in model.attention_shapes(plan)], (settings, plan)


def test_a_mask_is_timed_in_the_form_that_the_network_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels differ in which masks they take: a bool mask of pairs is another case than ToMe's bias for each key."""
    attend, forms = scaled_dot_product_attention, []

    def noted(q: Any, k: Any, v: Any, attn_mask: Any = None, **settings: Any) -> Any:
        forms.append(
            (q.shape[2], None if attn_mask is None else (attn_mask.shape, attn_mask.dtype == torch.bool, attn_mask.stride()))
        )
        return attend(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(attention_backend, "scaled_dot_product_attention", noted)
    settings: Any
    for settings in ({"tokens": "topk", "connections": "exact"}, {"tokens": MergeSettings(merged=2)},
                     {"tokens": MergeSettings(merged=2), "connections": "exact"}):  # fmt: skip
        forms.clear()
        model = build(tiny(), blocks=(0, 1), **settings)
        model(images(model.network, 2), Plan(0.6, 0.4))
        used = set(forms)
        forms.clear()
        measured(CPU, 2, model.attention_shapes(Plan(0.6, 0.4)), torch.float32)
        assert set(forms) == used and len(used) == 3, settings


class FirstChoice(torch.fx.Interpreter):
    """Runs a graph and notes the backend that comes first at each attention, as a compiler does that traces the graph."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is scaled_dot_product_attention:
            firsts.append((args[0].shape[2], _cur_sdpa_kernel_backends(with_priority=True)[0]))
        return super().call_function(target, args, kwargs)


firsts: list[tuple[int, SDPBackend]] = []


def test_each_attention_of_a_compiled_graph_has_the_kernel_of_its_count() -> None:
    """17 tokens in blocks 0 and 1, 9 in block 2; after the graph torch's own order is there again."""
    torch.compiler.reset()
    vit = tiny(drop_path_rate=0.0).train()
    model, x, graphs = build(vit, tokens="topk", blocks=(1,)), images(vit, 4), []
    plain, before = model(x, Plan(0.5)).logits, _cur_sdpa_kernel_backends(with_priority=True)
    model.kernels = {(17, False): "math", (9, False): "cudnn"}
    assert torch.allclose(model(x, Plan(0.5)).logits, plain, atol=1e-5)

    def noted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        firsts.clear()
        return FirstChoice(graph).run

    model.compile(backend=noted)
    found = model(x, Plan(0.5)).logits
    found.sum().backward()
    torch.compiler.reset()
    assert torch.allclose(found, plain, atol=1e-5) and len(graphs) == 1
    assert firsts == [(17, SDPBackend.MATH), (17, SDPBackend.MATH), (9, SDPBackend.CUDNN_ATTENTION)]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
