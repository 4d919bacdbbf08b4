"""`make gpu PART=check`: compare results of the GPU with those of the CPU, for every computation of a run on the device. Needs no
network. Without a GPU the CPU is compared with itself (the tests do that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity import keyed_random
from sparsity.examples.curriculum import TrainingRun
from sparsity.examples.forgetting import ForgettingSettings
from sparsity.types import Observation, Plan, single_process
from trainer.bench.gpu import check_graphs
from trainer.bench.gpu.compared import CPU, MECHANISMS, PLAN, Compared, Deviation, batch, network, on, passes, pixels, same
from trainer.bench.gpu.report import Host, Row
from trainer.config.schema import AugmentConfig
from trainer.config.schema_run import EngineConfig
from trainer.data.augment.mixup import Mix, mix_images
from trainer.data.augment.on_device import augment_on_device
from trainer.engine import cuda_graphs
from trainer.engine.left_out_steps import begin_momentum


def part(host: Host) -> Iterator[Row]:
    """Every computation of a run on the device, beside the CPU: random numbers, augmentation, passes, optimizer, bookkeeping."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device, keys = host.device, torch.arange(512) * 7919 - 12345
    augment, mix, rows = AugmentConfig(erasing=1.0, mixup=0.8), Mix(0.3, None), batch(8, 32)
    simple: dict[str, tuple[Compared, float]] = {
        "keyed uniform draws": (lambda d: keyed_random.uniform(keys.to(d), 3, 5), 0.0),
        "keyed normal draws": (lambda d: keyed_random.normal(keys.to(d), 9, shape=(16,)), 1e-5),
        "normalise, flip, erase": (lambda d: augment_on_device(on(rows, d), augment), 1e-5),
        "mixup": (lambda d: mix_images(augment_on_device(on(rows, d), augment), mix, rows.weights.to(d)), 1e-5),
    }
    for name, (compute, allowed) in simple.items():
        yield name, lambda c=compute, a=allowed: same(c, device, a).facts()
    for (tokens, connections), settings in MECHANISMS.items():
        yield (
            f"logits and gradients, {tokens}, {connections}",
            lambda s=settings: same(lambda d: _eager(d, s), device, 2e-4).facts(),
        )
    yield "kept patch ids (share that differs)", lambda: _kept_ids(device).facts()
    yield "forgetting keeps the same examples", lambda: _bookkeeping(device).facts()
    for name, optimizer in (("AdamW", torch.optim.AdamW), ("SGD", partial(torch.optim.SGD, momentum=0.9, nesterov=True))):
        yield f"fused {name} leaves steps out on the device", lambda one=optimizer: _left_out(device, one).facts()
    if host.on_gpu:
        yield "bf16 error against float64, ours / timm's", lambda: _bfloat16(device).facts()
    yield from check_graphs.rows(device, compiled=host.on_gpu)
    yield "CUDA graphs: the weights after four steps", lambda: _graphed(device).facts()


def _eager(device: torch.device, settings: Any) -> tuple[Tensor, Tensor]:
    return passes(network(device, **settings), pixels(1, 8, device), PLAN)


def _kept_ids(device: torch.device) -> Deviation:
    images = pixels(2, 8, CPU)
    here, there = (
        network(d, tokens="topk", blocks=(0, 1)).eval()(images.to(d), PLAN, frozenset({"kept"})).kept for d in (CPU, device)
    )
    shares = [(here[block].sort(-1).values != there[block].cpu().sort(-1).values).float().mean() for block in here]
    return Deviation(float(max(shares)), 0.01)


def _left_out(device: torch.device, kind: Callable[..., Any]) -> Deviation:
    """Two steps that are taken, with found_inf at 1 before each, beside the optimizer without a fused kernel, which makes only those."""
    results = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(4)
        weight = torch.nn.Parameter(torch.randn(64, 33, generator=generator).to(device))
        optimizer: Any = kind([weight], lr=1e-2, fused=fused)
        if fused:
            begin_momentum(optimizer)
        for spoiled in (1.0, 0.0, 1.0, 0.0):
            weight.grad = torch.randn(64, 33, generator=generator).to(device) * (float("nan") if spoiled else 1.0)
            if fused:
                optimizer.found_inf = torch.full((), spoiled, device=device)
            if fused or not spoiled:
                optimizer.step()
        results.append(weight.detach().cpu().double())
    return Deviation(float((results[0] - results[1]).abs().max()), 1e-6)


def _graphed(device: torch.device) -> Deviation:
    """Four compiled steps under two plans in CUDA graphs, a pass without gradients after each, beside the same without the graphs."""
    results = []
    for graphs in (False, True):
        settings = EngineConfig(kind="ddp", compile=True, cuda_graphs=graphs)
        model = network(device, tokens="topk", blocks=(0, 1))
        if device.type == "cuda":
            model.compile(**({"mode": mode} if (mode := cuda_graphs.mode_of(settings)) else {}))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        images = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 8, 3, 32, 32), dtype=np.float32)).to(device)
        keys, sums = torch.arange(8, device=device), torch.zeros((), device=device)
        for step, plan in enumerate((Plan(), Plan(0.7), Plan(0.7), Plan())):
            cuda_graphs.begin_pass(settings)
            model(images[step], plan, rng_keys=keys).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            cuda_graphs.begin_pass(settings)
            with torch.no_grad():
                sums += model(images[step], plan, rng_keys=keys).logits.square().mean()
        results.append(torch.cat([sums[None], *(p.detach().flatten() for p in model.parameters())]).cpu().double())
    return Deviation(float((results[0] - results[1]).abs().max()), 1e-5)


def _bookkeeping(device: torch.device) -> Deviation:
    """Forgetting on the device and on the CPU, from the same observations, keeps the same examples."""
    hashes = []
    for d in (torch.device("cpu"), device):
        run = TrainingRun(200, np.arange(200) % 10, epochs=12, seed=1)
        level = ForgettingSettings(removed=0.2, swap=0.05, window=3, updates=2).build(run)
        for epoch in range(7):
            chosen = level.select(epoch, single_process)
            ids = torch.arange(200)
            right = torch.from_numpy(np.random.default_rng(epoch).random(200) < 0.6)
            level.observe(
                ids.to(d),
                Observation(right.to(d), torch.ones(200).to(d), torch.rand(200).mul(0).to(d), torch.ones(200).bool().to(d)),
            )
        hashes.append(chosen.facts["hash"])
    return Deviation(float(hashes[0] != hashes[1]), 0.0)


def _bfloat16(device: torch.device) -> Deviation:
    """bf16 autocast: our error against float64 is at most twice timm's own (docs/laws.md, law 1)."""
    images = pixels(3, 16, device)
    ours = network(device).eval()
    with torch.no_grad():
        exact = network(device).double().eval().vit(images.double())
        with torch.autocast("cuda", torch.bfloat16):
            errors = [float((out.double() - exact).abs().max()) for out in (ours(images).logits, ours.vit(images))]
    return Deviation(errors[0] / max(errors[1], 1e-12), 2.0)
