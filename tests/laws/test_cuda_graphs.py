"""CUDA graphs without a GPU: the loop's own code on a network whose outputs, saved tensors and gradients lie, as those of a CUDA graph, in
memory that is overwritten when the next forward pass begins; what is refused; torch's modes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from sparsity.types import DENSE, Plan
from tests.conftest import ROOT
from tests.laws.test_nothing_waits import ROWS, batch_of, config_of
from trainer import train as loop
from trainer.bench.bookkeeping import stand_in
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.config.schema_run import EngineConfig
from trainer.data.augment.prepare import build_prepare
from trainer.data.order import BatchSplit
from trainer.engine import cuda_graphs
from trainer.engine.engine import Engine
from trainer.engine.processes import Processes
from trainer.model.build import build_distillation, build_examples, build_model, build_objective
from trainer.model.ema import Ema
from trainer.model.evaluate import evaluate
from trainer.model.optimizer import build_optimizer
from trainer.run.row_results import RowResults
from trainer.run.running_statistics import RunningStatistics
from trainer.telemetry.meters import Meters

LEVELS = {
    "tokens": {"method": "topk", "blocks": [1]},
    "connections": {"method": "shared_keys"},
    "examples": {"method": "forgetting"},
}


class ReusedMemory:
    """A backend of torch.compile. What its graphs gave out is overwritten with NaN when the next pass begins, if `overwrites`."""

    def __init__(self, overwrites: bool) -> None:
        self.overwrites, self.given, self.passes = overwrites, [], 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=self._compiled, bw_compiler=self._compiled)(graph, inputs)

    def _compiled(self, graph: Any, inputs: Any) -> Any:
        def run(arguments: list[Any]) -> Any:
            own = {one.untyped_storage().data_ptr() for one in arguments if isinstance(one, Tensor)}
            found = graph(*arguments)
            self.given += [
                one.detach() for one in found if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in own
            ]  # views of parameters are not the graph's; another reference to a gradient would make autograd copy it
            return found

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def begin_pass(self) -> None:
        self.passes += 1
        for one in self.given if self.overwrites else ():
            if one.is_floating_point():
                one.data.fill_(float("nan"))
        self.given.clear()


def trained(overwrites: bool, monkeypatch: pytest.MonkeyPatch, micro_batch: int = ROWS) -> tuple[dict[str, Tensor], Any, int]:
    """Weights, averages, sums and scores of four steps under three plans, with evaluations between, and the number of forward passes."""
    memory, compiler = ReusedMemory(overwrites), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode, **more: compiler(function, backend=memory, **more))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", memory.begin_pass)
    config = config_of(**LEVELS).changed(optim={"fused": False, "clip": 0.0})
    torch.manual_seed(0)
    model, examples = build_model(config), build_examples(config, stand_in(100, 10))
    engine: Any = Engine.__new__(Engine)
    Processes.__init__(engine, 0, 1, torch.device("cpu"))
    engine.settings = EngineConfig(kind="ddp", precision="float32", compile=True, cuda_graphs=True)
    engine.batch_split, engine.clip, engine._behind = BatchSplit(micro_batch, ROWS // micro_batch, ROWS), 0.0, 0
    engine.model, engine.optimizer, engine.decides_on_device = model.train(), build_optimizer(model, config.optim), False
    model.compile(mode=cuda_graphs.mode_of(engine.settings))
    distillation = build_distillation(config)
    meters = Meters(engine, distillation.parts)
    run: Any = SimpleNamespace(
        engine=engine, model=model, prepare=build_prepare(config.augment, 10, compiled=False), meters=meters,
        results=RowResults(
            build_objective(config), distillation, examples, meters, engine.scaled, compiled=False, device=engine.device
        ),
        teacher=SimpleNamespace(observe=lambda images, end_phase: None),
        statistics=RunningStatistics(model.network, engine, alike=False),
        pruning=SimpleNamespace(after_step=lambda lr, taken: None), ema=Ema(model.network, 0.9),
        chain=SimpleNamespace(add=lambda *rows: None), stopping=SimpleNamespace(requested=lambda: False),
        outputs=frozenset({"cls_attention"}),
    )  # fmt: skip
    scores = []
    for step, plan in enumerate((DENSE, Plan(0.7, 0.5), Plan(0.7, 0.5), DENSE)):
        _, taken, _ = loop._step(run, config, step, batch_of(ROWS), plan, 1e-2)
        with run.ema.applied(model.network):
            model.eval()
            scored = evaluate(engine.forward, [batch_of(ROWS)] * 2, plan, 10, config.augment, engine.device)
            model.train()
        scores.append((taken, scored.top1, scored.loss))
    state = {name: value.detach().clone() for name, value in model.state_dict().items()} | run.ema.state_dict()
    known = {name: torch.as_tensor(value) for name, value in examples.state_dict(lambda tensor: tensor).items()}
    return state | known, scores, memory.passes


@pytest.mark.slow
def test_nothing_of_a_pass_is_read_once_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is overwritten changes no bit of four steps and eight evaluation batches: nothing that is kept lies in it."""
    plain, scores, _ = trained(False, monkeypatch)
    monkeypatch.undo()
    found, others, passes = trained(True, monkeypatch)
    assert passes == 4 * 3
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    assert others == scores and all(taken and loss == loss for taken, _, loss in scores)


@pytest.mark.slow
def test_the_gradients_of_two_micro_batches_would_be_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why these are refused; and that the memory of the test above finds such a reader."""
    _, scores, _ = trained(True, monkeypatch, micro_batch=ROWS // 2)
    assert not any(taken for taken, _, _ in scores), "their sum is not finite"


@pytest.mark.parametrize(
    ("on_gpu", "world", "rows", "words"),
    [
        (False, 1, (8, 1, 8), "no CUDA device here"),
        (True, 4, (8, 1, 8), "on 4 processes"),
        (True, 1, (8, 3, 24), "data.micro_batch=8: 3 micro-batches per step.*set data.micro_batch=24"),
    ],
)
def test_what_only_the_start_knows_is_refused(on_gpu: bool, world: int, rows: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.cuda_graphs=true.*{words}.*set engine.cuda_graphs=false"):
        cuda_graphs.refuse(on_gpu, world, BatchSplit(*rows))


@pytest.mark.parametrize(
    ("engine", "remedy"),
    [
        ("{kind: ddp, cuda_graphs: true}", "set engine.compile=true"),
        ("{compile: true, cuda_graphs: true}", "set engine.kind=ddp"),
        ("{kind: ddp, compile: true, cuda_graphs: true, checkpointing: true}", "set engine.checkpointing=false"),
    ],
)
def test_settings_that_do_not_fit_are_refused(engine: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.cuda_graphs=true with engine.*{remedy}, or engine.cuda_graphs=false"):
        load(ROOT / "configs/quickstart.yaml", [f"engine={engine}"])


def test_a_run_without_a_gpu_is_refused_before_it_compiles() -> None:
    engine: Any = Engine.__new__(Engine)
    Processes.__init__(engine)
    engine.settings, engine.on_gpu = EngineConfig(kind="ddp", compile=True, cuda_graphs=True), False
    engine.batch_split, model = BatchSplit(8, 1, 8), torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="no CUDA device here"):
        engine.prepare(model, torch.optim.SGD(model.parameters()))


def test_the_modes_are_torchs() -> None:
    found = [
        cuda_graphs.mode_of(EngineConfig(cuda_graphs=on, autotune=tuned)) for on in (False, True) for tuned in (False, True)
    ]
    assert found == [None, "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"]
    cuda_graphs.refuse(True, 1, BatchSplit(8, 1, 8))
