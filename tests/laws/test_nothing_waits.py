"""A training step and an evaluation make the host wait for nothing: the loop's own code on fake tensors of a CUDA device, under a mode that
refuses a number read by the host, an indexing by a mask, and a copy that waits. Numbers every `log_every` steps are read outside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sparsity.types import DENSE, Plan
from tests.support import images as drawn
from tests.support import waiting
from tests.support.waiting import CUDA, NoWaits, Waits, fake_cuda, moved
from trainer import train as loop
from trainer.bench.bookkeeping import stand_in
from trainer.checkpoint.state import TrainState
from trainer.data.augment import on_device
from trainer.data.augment.prepare import build_prepare
from trainer.data.batch import Batch
from trainer.data.order import BatchSplit
from trainer.engine import upload
from trainer.engine.engine import Engine
from trainer.engine.left_out_steps import leaves_out_on_device
from trainer.engine.processes import Processes
from trainer.model.build import build_distillation, build_examples, build_model, build_objective, build_pruning
from trainer.model.ema import Ema
from trainer.model.evaluate import evaluate
from trainer.model.optimizer import build_optimizer
from trainer.run.nonfinite_steps import Outcomes
from trainer.run.row_results import RowResults
from trainer.run.running_statistics import RunningStatistics
from trainer.run.weight_pruning import WeightPruning
from trainer.telemetry.meters import Meters

ROWS, SIDE = 8, 32
ARGS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
LEVELS = {
    "topk, shared keys, forgetting": {
        "tokens": {"method": "topk", "blocks": [1]},
        "connections": {"method": "shared_keys"},
        "examples": {"method": "forgetting"},
    },
    "topk, exact, infobatch": {
        "tokens": {"method": "topk", "blocks": [1]},
        "connections": {"method": "exact"},
        "examples": {"method": "infobatch"},
    },
    "tome, random examples": {"tokens": {"method": "tome", "keep": 0.7, "blocks": [1]}, "examples": {"method": "random_epoch"}},
    "random": {"tokens": {"method": "random", "blocks": [1]}},
    "policy on the device": {"augment": {"policy": "rand-m9-mstd0.5-inc1", "policy_on": "device"}},
    "3-Augment on the device": {"augment": {"policy": "three_augment", "policy_on": "device", "color_jitter": 0.3}},
    "dense": {},
    "topk, bf16 autocast": {
        "tokens": {"method": "topk", "blocks": [1]},
        "engine": {"precision": "autocast", "residual": "bf16"},
    },
    "group lasso": {"weights": {"method": "group_lasso", "keep": 0.5, "groups": "columns", "block": [8, 8], "start": "0ep"}},
    "admm": {"weights": {"method": "admm", "keep": 0.5, "groups": "columns", "block": [8, 8], "start": "0ep"}},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Images of this size are copied by themselves, as those of a run are. Tables that are made once per device must not stay fake."""
    monkeypatch.setattr(upload, "SMALL", 1 << 10)
    monkeypatch.setattr(waiting, "PAGEABLE", 1 << 10)
    yield
    for cached in (on_device._statistics, on_device._table):
        cached.cache_clear()


def config_of(**levels: Any) -> Any:
    return drawn.config(
        "none-*.tar",
        name="waits",
        control=0,
        model={"name": "deit_tiny_patch16_224", "classes": 10, "image_size": SIDE, "drop_path": 0.1, "args": ARGS},
        data={"validation": "none-*.tar", "batch": ROWS, "micro_batch": ROWS // 2},
        augment={"erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1} | levels.pop("augment", {}),
        optim={"ema": 0.999, "clip": 1.0, "fused": True},
        engine={"kind": "ddp", "precision": "float32"} | levels.pop("engine", {}),
        tracking={"to": "journal"},
        **levels,
    )


@unset_fake_temporarily()
def batch_of(rows: int) -> Batch:
    """As the loader gives it, its images pinned."""
    ids = torch.arange(rows)
    return Batch(
        images=torch.zeros(rows, 3, SIDE, SIDE, dtype=torch.uint8).pin_memory(), labels=ids % 10, ids=ids, copies=torch.zeros_like(ids),
        weights=torch.ones(rows), policy=torch.zeros(rows, 4, 2),
        flip=ids > 2, erase=torch.ones(rows, 4, dtype=torch.int32), jpeg=torch.zeros(rows, 0), rng_keys=ids * 77, broken=[],
    )  # fmt: skip


def run_of(config: Any, compiled: bool = False) -> Any:
    """The parts of a run that a step uses, on the fake device."""
    with unset_fake_temporarily():  # timm reads numbers while it builds
        model, examples = build_model(config), build_examples(config, stand_in(100, 10))
        level = build_pruning(config, model)
        level.begin_epoch(0, lambda: {name: value.detach() for name, value in model.network.named_parameters()})
    engine: Any = Engine.__new__(Engine)
    Processes.__init__(engine, 0, 1, CUDA)
    engine.settings, engine.batch_split, engine.clip, engine._behind = (
        config.engine, BatchSplit(ROWS // 2, 2, ROWS), config.optim.clip, 0,
    )  # fmt: skip
    engine.model = moved(model).train()
    engine.optimizer = build_optimizer(model, config.optim)
    engine.decides_on_device = leaves_out_on_device(engine.optimizer)
    distillation = build_distillation(config)
    meters, objective = Meters(engine, distillation.parts), build_objective(config)
    pruning: Any = SimpleNamespace(after_step=lambda lr, taken: None)
    if config.weights.method != "all":
        recorder: Any = None  # of an epoch's line
        pruning = WeightPruning(level, engine, model, Ema(model.network, None), recorder, level.state_dict())
        assert level.moves
    return SimpleNamespace(
        engine=engine, model=model, prepare=build_prepare(config.augment, 10, compiled=compiled), meters=meters,
        results=RowResults(objective, distillation, examples, meters, engine.scaled, compiled=compiled, device=CUDA),
        teacher=SimpleNamespace(observe=lambda images, end_phase: None),
        statistics=RunningStatistics(model.network, engine, alike=False),
        pruning=pruning, ema=Ema(model.network, config.optim.ema),
        chain=SimpleNamespace(add=lambda *rows: None),  # numpy on the host alone
        stopping=SimpleNamespace(requested=lambda: False),
        outputs=frozenset({"cls_attention"}) if examples.wants_spread else frozenset(),
    )  # fmt: skip


def graded(model: Any) -> None:
    """In place of a backward pass, for which autograd looks for a real device; its operations are torch's own."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_step_waits_for_nothing(levels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the batch to the average: two micro-batches, mixed, erased, clipped; whether the step is taken is decided on the device."""
    config = config_of(**LEVELS[levels])
    with fake_cuda(monkeypatch):
        run = run_of(config)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: graded(run.model))
        assert run.engine.decides_on_device
        loop._step(run, config, 0, batch_of(ROWS), DENSE, 1e-3)  # tables and the optimizer's state are made once
        with NoWaits() as counted:
            _, taken, stop = loop._step(run, config, 1, batch_of(ROWS), Plan(0.7, 0.5), 1e-3)
    assert isinstance(taken, torch.Tensor) and taken.device == CUDA and not stop
    assert counted.copies == 2 * 2 + 2, (
        "images and fields of two micro-batches, the sum of the weights, and back whether to stop"
    )
    assert counted.operations > 300


@pytest.mark.parametrize("levels", ["dense", "topk, shared keys, forgetting", "topk, exact, infobatch"])
def test_a_compiled_step_has_at_most_25_kernels_outside_of_its_graphs(levels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch of one process without clipping: 2 copies of the batch, 2 for the sum of the weights and whether to stop, 3 for the
    norm, 4 for whether it is finite, 1 that copies it, 3 per group of the fused optimizer, 4 for the average, and 1, not counted here, that
    begins the backward pass. The operations of the graphs go one by one, without inductor: none waits."""
    config = config_of(**LEVELS[levels]).changed(optim={"clip": 0.0}, data={"micro_batch": ROWS})
    counted = NoWaits()

    def compile(function: Any, **settings: Any) -> Any:
        return counted.one_kernel(getattr(function, "__qualname__", "prepare"), function)

    monkeypatch.setattr(torch, "compile", compile)
    with fake_cuda(monkeypatch):
        run = run_of(config, compiled=True)
        run.engine.batch_split = BatchSplit(ROWS, 1, ROWS)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: counted.one_kernel("backward", graded)(run.model))
        monkeypatch.setattr(run.model, "forward", counted.one_kernel("network", run.model.forward))
        loop._step(run, config, 0, batch_of(ROWS), DENSE, 1e-3)
        counted.graphs.clear()
        with counted:
            _, taken, _ = loop._step(run, config, 1, batch_of(ROWS), DENSE, 1e-3)
            assert Outcomes(CUDA).add(taken, TrainState()) == []
    assert counted.graphs == ["prepare", "network", "RowResults._whole", "backward"]
    assert counted.copies == 2 + 3
    assert len(counted.kernels) <= 25 - 1, counted.kernels


def test_an_evaluation_waits_for_nothing_between_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception): ...

    def add_up(sums: torch.Tensor) -> torch.Tensor:
        raise Ended

    config = config_of()
    with fake_cuda(monkeypatch):
        run = run_of(config)
        evaluate_of = {"plan": DENSE, "classes": 10, "augment": config.augment, "device": CUDA, "add_up": add_up}
        with pytest.raises(Ended):
            evaluate(run.engine.forward, [batch_of(4)], **evaluate_of)  # tables are made
        with NoWaits() as counted, pytest.raises(Ended):
            evaluate(run.engine.forward, [batch_of(4), batch_of(4)], **evaluate_of)
    assert counted.copies == 2 * 3


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: float(x.sum()), lambda x: bool(x.isfinite().all()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu(),
        lambda x: torch.zeros(3).to(CUDA), lambda x: x.index_put_((x > 0,), torch.ones((), device=CUDA)),
        lambda x: torch.zeros(70_000).to(CUDA, non_blocking=True), lambda x: torch.empty(3).copy_(x, non_blocking=True),
    ],
)  # fmt: skip
def test_what_waits_is_found(waits: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        x = torch.ones(3, device=CUDA)
        with NoWaits(), pytest.raises(Waits):
            waits(x)
        with NoWaits() as counted:
            torch.zeros(70_000).pin_memory()[1:].to(CUDA, non_blocking=True)
            torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
        assert counted.copies == 2


def test_an_optimizer_without_a_fused_step_is_decided_by_the_host() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    assert leaves_out_on_device(torch.optim.AdamW(parameters, fused=True))
    assert not leaves_out_on_device(torch.optim.AdamW(parameters)) and not leaves_out_on_device(torch.optim.SGD(parameters))
