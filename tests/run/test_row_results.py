"""Loss, observations and meters of a micro-batch: the numbers of the single parts, eager and compiled, and one graph for a whole run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsity.examples.observations import Observations
from sparsity.types import ModelOutput
from trainer.data.augment.mixup import NO_MIX, Mix, numbers
from trainer.data.batch import Batch
from trainer.engine.engine import Engine
from trainer.model.distillation import Distillation
from trainer.model.objective import Objective
from trainer.run.row_results import RowResults
from trainer.telemetry.meters import Meters

B, C, WORLD, CPU = 8, 5, 3, torch.device("cpu")
MIXES = {
    "none": NO_MIX, "clear": Mix(0.8), "unclear": Mix(0.6), "half": Mix(0.5), "the other's": Mix(0.2), "cut": Mix(0.4, (0, 2, 0, 2)),
}  # fmt: skip
TAUGHT = Distillation("soft", tau=2.0, alpha=0.3)


class Level:
    """The part of a method of level 1 that observes."""

    def __init__(self, value: Any = "loss") -> None:
        self.observations = Observations(40, value)

    def allocate(self, device: torch.device) -> None:
        self.observations.allocate(device)

    def observe(self, ids: Tensor, observation: Any) -> None:
        self.observations.record(ids, observation)


def batch() -> Batch:
    ids = torch.arange(B) * 3
    weights, labels = torch.ones(B), ids % C
    weights[3] = weights[-1] = 0.0  # broken; padding
    ids[-1] = labels[-1] = -1
    nothing = torch.zeros(B, dtype=torch.int64)
    return Batch(
        images=torch.zeros(B, 0), labels=labels, ids=ids, copies=(torch.arange(B) == 5).long(), weights=weights, policy=nothing,
        flip=nothing,
        erase=nothing, jpeg=nothing, rng_keys=ids, broken=[(9, "truncated")],
    )  # fmt: skip


def engine() -> Any:
    found: Any = Engine.__new__(Engine)
    found.rank, found.world, found.device = 0, 1, CPU
    return found


def parts(rule: str = "clear", distillation: Distillation = TAUGHT, compiled: bool = False, value: Any = "loss") -> Any:
    ranks = engine()
    meters, level, objective = Meters(ranks, distillation.parts), Level(value), Objective(C, smoothing=0.1, rule=rule)
    ranks.world = WORLD
    examples: Any = level
    results = RowResults(objective, distillation, examples, meters, ranks.scaled, compiled=compiled, device=CPU)
    return SimpleNamespace(results=results, level=level, meters=meters, objective=objective, distillation=distillation)


def given(seed: int, width: int = 7) -> tuple[ModelOutput, ModelOutput]:
    """Of the network, with a gradient, and of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    logits, attention = (torch.randn(B, n, generator=generator) for n in (C, width))
    return ModelOutput(logits.requires_grad_(), attention.softmax(1)), ModelOutput(torch.randn(B, C, generator=generator))


def after(made: Any, mix: Mix, seed: int = 0, width: int = 7) -> dict[str, Tensor]:
    """All that a call changes: loss, its gradient, observations, sums."""
    rows, (output, taught) = batch()._replace(broken=[(seed, "truncated")] * seed), given(seed, width)
    targets = made.objective.targets(rows.labels, mix, rows.weights)
    loss = made.results(rows, mix._replace(numbers=numbers(mix)), output, targets, taught, torch.tensor(6.0))
    loss.backward()
    level = made.level.observations
    number = (
        level._number[:-1].clone() if level._number is not None else torch.zeros(0)
    )  # the last slot is of rows that do not count
    return {"loss": loss.detach(), "gradient": output.logits.grad, "code": level._code[:-1].clone(), "number": number,
            "sums": made.meters._sums.clone()}  # fmt: skip


@pytest.mark.parametrize("rule", ["clear", "without_partner", "authors"])
@pytest.mark.parametrize("mix", MIXES)
def test_it_is_loss_credit_and_meters_one_after_the_other(rule: str, mix: str) -> None:
    """The loss is this rank's part of the mean, times the ranks that the engine averages over."""
    made, rows, (output, taught) = parts(rule), batch(), given(0)
    found = after(made, MIXES[mix])
    targets = made.objective.targets(rows.labels, MIXES[mix], rows.weights)
    losses, each = TAUGHT(made.objective.losses(output.logits, targets), output, taught)
    loss = (losses * rows.weights).sum() / 6.0 * WORLD
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach())
    torch.testing.assert_close(found["gradient"], output.logits.grad)
    ids, observation = made.objective.credit(rows, output, losses, MIXES[mix])
    level, meters = Observations(40, "loss"), Meters(engine(), TAUGHT.parts)
    level.record(ids, observation)
    meters.add(losses, rows.weights, observation, each)
    assert level._code is not None and level._number is not None
    assert torch.equal(found["code"], level._code[:-1]) and torch.equal(found["number"], level._number[:-1])
    assert torch.equal(found["sums"], meters._sums) and found["sums"][1] == 6 and found["code"].sum() > 0


@pytest.mark.parametrize("rule", ["clear", "without_partner", "dominant", "authors"])
@pytest.mark.parametrize("value", ["loss", "spread", None])
def test_one_graph_gives_the_same_for_every_mix_plan_and_broken_image(
    rule: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with the operations of the graph one by one: neither the share of a mix nor the number of tokens makes another graph."""
    from torch._dynamo.testing import CompileCounter

    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compiler(function, backend=counter, **settings))
    torch.compiler.reset()
    eager, compiled = parts(rule, value=value), parts(rule, value=value, compiled=True)
    for turn, mix in enumerate(MIXES.values()):
        mine, theirs = (after(made, mix, turn, width=7 - turn) for made in (compiled, eager))
        for name, number in theirs.items():
            assert torch.equal(mine[name], number), name
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_gives_the_same_and_an_infinite_loss_a_gradient_that_is_not_finite() -> None:
    """The engine leaves a step out by its norm: 0 x infinity must stay NaN in compiled code."""
    torch.compiler.reset()
    eager, compiled = parts(), parts(compiled=True)
    for turn, mix in enumerate(MIXES.values()):
        mine, theirs = (after(made, mix, turn) for made in (compiled, eager))
        for name, number in theirs.items():
            torch.testing.assert_close(mine[name], number, rtol=1e-6, atol=1e-6)
    rows, (output, taught) = batch(), given(0)
    targets = torch.full((B, C), 1e38)  # finite; the loss overflows
    loss = compiled.results(rows, NO_MIX._replace(numbers=numbers(NO_MIX)), output, targets, taught, torch.tensor(6.0))
    loss.backward()
    assert not loss.isfinite() and not output.logits.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["clear", "authors"])
def test_on_a_gpu_it_is_few_kernels_which_compile(rule: str) -> None:
    from trainer.bench.gpu import lowering, pretended

    made, rows, (output, taught) = parts(rule, value="spread"), batch(), given(0)
    made.level.allocate(CPU)
    whole = made.results._whole

    def function(logits: Tensor, mixed: Tensor, targets: Tensor, theirs: Tensor, spread: Tensor, total: Tensor) -> Tensor:
        return whole(rows, mixed, ModelOutput(logits), targets, ModelOutput(theirs), total, spread)

    with pretended.h200():
        given_ = (output.logits, numbers(Mix(0.3)), torch.ones(B, C), taught.logits, torch.ones(B), torch.tensor(6.0))
        graphs = lowering.lower(function, *given_, autocast=False)
        assert [graph.backward for graph in graphs] == [False, True]
        kernels = [[kernel.name for kernel in graph.kernels] for graph in graphs]
        assert len(kernels[0]) <= 6 and len(kernels[1]) <= 3, kernels
        for graph in graphs:
            for name, source in graph.code.items():
                lowering.compile_kernel(name, source)
