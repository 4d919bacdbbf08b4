"""Rows of `make gpu PART=profile` for what a step computes outside of the network's passes and the optimizer, each alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from sparsity.types import ModelOutput
from trainer.bench.bookkeeping import EXAMPLES, bookkeeping, stand_in
from trainer.bench.gpu import compared, counts
from trainer.bench.gpu.facts import timed
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.config.run_config import Config
from trainer.config.schema import AugmentConfig
from trainer.data.augment.mixup import draw_mix, numbers
from trainer.data.augment.policy_draws import PolicyDraws
from trainer.data.augment.prepare import build_prepare
from trainer.data.batch import Batch
from trainer.engine.processes import Processes
from trainer.model.build import build_distillation, build_examples, build_objective
from trainer.model.ema import Ema
from trainer.run.row_results import RowResults
from trainer.telemetry.meters import Meters


def rows(host: Host, config: Config) -> Iterator[Row]:
    """ms of each; graphs are compiled as in a run, on a CPU not. `policy: device` last: its graph takes longest to compile."""
    examples = 1000 if host.tiny else EXAMPLES
    yield "bookkeeping of examples, eager", lambda: _books(host, config, examples)
    yield "graph of loss, observations and meters", lambda: _timed(host, _results(host, config, examples))
    yield "average of weights", lambda: _timed(host, partial(Ema(_network(host, config), 0.9999).update, _true(host)))
    yield "graph of images and targets", lambda: _timed(host, _prepared(host, config, config.augment))
    augment = config.augment.model_copy(update={"policy": "rand-m9-mstd0.5-inc1", "policy_on": "device"})
    yield "graph of images and targets, RandAugment", lambda: _timed(host, _prepared(host, config, augment))


def _timed(host: Host, one: Callable[[], Any]) -> Facts:
    return {"ms": 1000 * timed(one, host.device, 1 if host.tiny else 20)}


def _true(host: Host) -> Any:
    """Whether the step was taken, as the engine says it."""
    return torch.ones((), dtype=torch.bool, device=host.device) if host.on_gpu else True


def _network(host: Host, config: Config) -> Any:
    return counts.network_of(config, counts.rows()["dense"]).to(host.device)


def _books(host: Host, config: Config, examples: int) -> Facts:
    found = bookkeeping(config, host.device, examples)
    return {"ms": found["median"], "worst_ms": found["max"], "megabytes": found["megabytes"], "method": found["method"]}


def _batch(host: Host, config: Config) -> Batch:
    size, rows = config.model.image_size, config.data.micro_batch
    given = compared.batch(rows, size)
    ids = torch.arange(rows)
    return compared.on(given._replace(ids=ids, labels=ids % config.model.classes), host.device)


def _prepared(host: Host, config: Config, augment: AugmentConfig) -> Callable[[], Any]:
    given = _batch(host, config)
    if augment.policy_on == "device":
        draws = PolicyDraws(augment, config.model.image_size)
        steps = [draws(random.Random(row)) for row in range(len(given.ids))]
        given = given._replace(policy=torch.tensor(steps, dtype=torch.float64, device=host.device))
    mix = draw_mix(augment, config.seed, 0, config.model.image_size)
    mix = mix._replace(numbers=numbers(mix).to(host.device))
    prepare = build_prepare(augment, config.model.classes, compiled=not host.tiny)
    return lambda: prepare(given, mix)


def _results(host: Host, config: Config, examples: int) -> Callable[[], Any]:
    """Forward and backward, to the logits."""
    process: Any = Processes(device=host.device)
    level = build_examples(config, stand_in(examples, config.model.classes))
    objective, distillation = build_objective(config), build_distillation(config)
    results = RowResults(
        objective, distillation, level, Meters(process, distillation.parts), lambda loss: loss, compiled=not host.tiny,
        device=host.device,
    )  # fmt: skip
    given = _batch(host, config)
    mix = draw_mix(config.augment, config.seed, 0, config.model.image_size)
    mix = mix._replace(numbers=numbers(mix).to(host.device))
    targets, total = objective.targets(given.labels, mix, given.weights), given.weights.sum()
    logits = torch.randn(len(given.ids), config.model.classes, device=host.device).requires_grad_()

    def one() -> None:
        results(given, mix, ModelOutput(logits), targets, None, total).backward()
        logits.grad = None

    return one
