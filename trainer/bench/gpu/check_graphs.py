"""Rows of `make gpu PART=check` for what torch.compile and Triton make for the device: the graphs of a run beside the same code eager on
the CPU. Without a GPU nothing is compiled here, because a C++ compiler takes minutes; the tests of each graph compile it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.examples.observations import Observations
from sparsity.types import ModelOutput
from trainer.bench.gpu.compared import (
    CPU,
    MECHANISMS,
    PLAN,
    TOP_K,
    Deviation,
    Results,
    batch,
    deviation,
    network,
    on,
    passes,
    pixels,
    same,
)
from trainer.bench.gpu.report import Facts, Row
from trainer.config.schema import AugmentConfig
from trainer.data.augment.mixup import Mix, numbers
from trainer.data.augment.policy_draws import PolicyDraws
from trainer.data.augment.policy_on_device import apply_policy, codes_of
from trainer.data.augment.prepare import build_prepare
from trainer.data.augment.transform import resized
from trainer.engine.processes import Processes
from trainer.model.distillation import Distillation
from trainer.model.ema import Ema
from trainer.model.objective import Objective
from trainer.run.row_results import RowResults
from trainer.telemetry.meters import Meters

POLICY = AugmentConfig(policy="rand-m9-n1-mstd0.5-inc1", policy_on="device")
CROPS = ((40, 50, 0, 0, 40, 50), (20, 70, 3, 5, 10, 60), (9, 7, 1, 1, 8, 3), (370, 250, 12, 0, 320, 250))
"""Height and width of a picture; top, left, height and width of its crop."""


def rows(device: torch.device, compiled: bool) -> Iterator[Row]:
    """compiled: False compares the eager code."""

    def beside_eager(compute: Callable[[torch.device, bool], Results], allowed: float) -> Facts:
        return deviation(compute(CPU, False), compute(device, compiled), allowed).facts()

    yield "graph of images and targets", lambda: beside_eager(_prepared, 1e-5)
    yield "augmentation policy, grey levels", lambda: _policy(device, compiled).facts()
    yield "crops resized by the kernel, grey levels", lambda: _crops(device).facts()
    yield "graph of loss, observations and meters", lambda: beside_eager(_row_results, 1e-5)
    yield "average of weights, a step left out", lambda: same(_averaged, device, 1e-6).facts()
    for (tokens, connections), settings in MECHANISMS.items() if compiled else ():
        yield f"compiled, {tokens}, {connections}", lambda s=settings: beside_eager(partial(_passes, s), 2e-4)
    for (tokens, connections), settings in MECHANISMS.items():
        yield f"compiled bf16, {tokens}, {connections}", lambda s=settings: _half(device, compiled, s)
    yield "compiled bf16 residual, topk, all", lambda: _half(device, compiled, TOP_K, torch.bfloat16)


def _prepared(device: torch.device, compiled: bool) -> tuple[Tensor, ...]:
    augment, given = AugmentConfig(erasing=1.0, mixup=0.8, cutmix=1.0, smoothing=0.1), on(batch(8, 32), device)
    prepare = build_prepare(augment, 10, compiled=compiled)
    return tuple(
        result
        for mix in (Mix(0.3), Mix(0.6, (2, 14, 5, 16)))
        for result in prepare(given, mix._replace(numbers=numbers(mix).to(device)))
    )


def _policy(device: torch.device, compiled: bool) -> Deviation:
    """One operation of RandAugment for each of 64 images, without one value in a thousand: a warp may take a neighbour at a border."""
    draws, codes = PolicyDraws(POLICY, 32), codes_of(POLICY)
    steps = torch.tensor([draws(random.Random(row)) for row in range(64)], dtype=torch.float64)
    images = batch(64, 32).images
    here = apply_policy(images, steps, codes, POLICY)
    there = (torch.compile(apply_policy, dynamic=False) if compiled else apply_policy)(
        images.to(device), steps.to(device), codes, POLICY
    )
    errors = (here.int() - there.cpu().int()).abs().float().flatten()
    return Deviation(float(errors.quantile(0.999)), 1.0)


def _crops(device: torch.device) -> Deviation:
    rng = np.random.default_rng(6)
    pictures = [torch.from_numpy(rng.integers(0, 256, (3, *crop[:2]), dtype=np.uint8)) for crop in CROPS]
    worst = 0.0
    for kind in ("bicubic", "bilinear"):
        expected = torch.stack(
            [
                resized(one[:, top : top + height, left : left + width], 16, 16, kind)
                for one, (_, _, top, left, height, width) in zip(pictures, CROPS, strict=True)
            ]
        )
        found = expected
        if device.type == "cuda":
            found = _by_kernel(pictures, kind, device)
        worst = max(worst, float((expected.int() - found.int()).abs().max()))
    return Deviation(worst, 1.0)


def _by_kernel(pictures: list[Tensor], kind: str, device: torch.device) -> Tensor:
    from trainer.data.augment.resize_kernel import resized_crops

    begin = np.cumsum([0, *(one.numel() for one in pictures)])
    table = torch.tensor([[row, begin[row], *crop] for row, crop in enumerate(CROPS)], device=device)
    out = torch.zeros(len(pictures), 16, 16, 3, dtype=torch.uint8, device=device)
    resized_crops(torch.cat([one.flatten() for one in pictures]).to(device), table, out, kind)
    return out.permute(0, 3, 1, 2).cpu()


class _Examples:
    """The part of a method of level 1 that observes."""

    def __init__(self) -> None:
        self.observations = Observations(40, "loss")
        self.allocate, self.observe = self.observations.allocate, self.observations.record


def _row_results(device: torch.device, compiled: bool) -> tuple[Tensor, ...]:
    """Loss, its gradient, observations and sums of two mixes."""
    process: Any = Processes(device=device)
    examples: Any = _Examples()
    objective, meters = Objective(10, smoothing=0.1, rule="clear"), Meters(process)
    results = RowResults(objective, Distillation("none"), examples, meters, lambda loss: loss, compiled=compiled, device=device)
    given = on(batch(8, 32)._replace(ids=torch.arange(8) * 3), device)
    found = []
    for seed, mix in enumerate((Mix(0.8), Mix(0.4, (0, 2, 0, 2)))):
        drawn = np.random.default_rng(seed).standard_normal((8, 10), dtype=np.float32)
        logits = torch.from_numpy(drawn).to(device).requires_grad_()
        mix = mix._replace(numbers=numbers(mix).to(device))
        targets = objective.targets(given.labels, mix, given.weights)
        loss = results(given, mix, ModelOutput(logits), targets, None, torch.tensor(8.0, device=device))
        loss.backward()
        found += [loss.detach(), logits.grad]
    observed, read = examples.observations.gather(lambda values: values), meters.reduce().facts
    numbers_read = [*observed.ids, *observed.correct, *observed.value, read["loss"], read["train_top1"]]
    return *found, torch.tensor(numbers_read, dtype=torch.float64)


def _averaged(device: torch.device) -> Tensor:
    """Four steps, of which the device says that the second was left out."""
    model = network(device)
    average = Ema(model, 0.9)
    for step in range(4):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.01)
        average.update(step != 1 if device == CPU else torch.tensor(step != 1, device=device))
    return torch.cat([values.flatten() for values in average.state_dict().values()])


def _passes(settings: Any, device: torch.device, compiled: bool) -> tuple[Tensor, Tensor]:
    model = network(device, **settings)
    if compiled:
        model.compile(dynamic=False)
    return passes(model, pixels(1, 8, device), PLAN)


def _half(device: torch.device, compiled: bool, settings: Any, residual: torch.dtype | None = None) -> Facts:
    """The error of compiled bf16 against float64 on the CPU. logits: the median over images (in bf16 one may choose other tokens), and at
    most twice that of the eager device (docs/laws.md, law 1). gradients: 1 - cosine; .00003 to .0001 where all is well."""
    exact = passes(network(CPU, **settings).double(), pixels(1, 16, CPU).double(), PLAN)
    errors, angles = [], []
    for ours in (True, False):
        model = network(device, **settings)
        model.residual = residual if ours else None
        if ours and compiled:
            model.compile(dynamic=False)
        with torch.autocast(device.type, torch.bfloat16):
            logits, gradients = (result.cpu().double() for result in passes(model, pixels(1, 16, device), PLAN))
        errors.append(float((logits - exact[0]).abs().amax(1).median()))
        angles.append(1.0 - float(torch.cosine_similarity(gradients, exact[1], dim=0)))
    ratio = errors[0] / max(errors[1], 1e-12)
    return {"ok": ratio <= 2.0 and angles[0] <= 1e-3, "error_of_eager": ratio, "allowed": 2.0, "gradients": angles[0]}
