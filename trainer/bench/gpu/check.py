"""`make gpu PART=check`: compare results of the GPU with those of the CPU, for every computation of a run on the device. Needs no
network. Without a GPU the CPU is compared with itself (the tests do that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor

from sparsity import build, keyed_random
from sparsity.examples.curriculum import TrainingRun
from sparsity.examples.forgetting import ForgettingSettings
from sparsity.tokens.tome import MergeSettings
from sparsity.types import Observation, Plan, single_process
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.config.schema import AugmentConfig
from trainer.config.schema_run import EngineConfig
from trainer.data.augment.mixup import Mix, mix_images
from trainer.data.augment.on_device import augment_on_device
from trainer.data.batch import Batch
from trainer.engine import cuda_graphs
from trainer.engine.left_out_steps import begin_momentum


class Deviation(NamedTuple):
    """The largest difference of a comparison, and the allowed one."""

    difference: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.difference <= self.allowed


Compared = Callable[[torch.device], Tensor]
MECHANISMS = (("all", "all"), ("topk", "all"), ("topk", "exact"), ("topk", "shared_keys"), ("tome", "all"), ("random", "all"))


def part(host: Host) -> Iterator[Row]:
    """Every computation of a run on the device, beside the CPU: random numbers, augmentation, passes, optimizer, bookkeeping."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device, keys, plan = host.device, torch.arange(512) * 7919 - 12345, Plan(0.7, 0.5)
    augment, mix, batch = AugmentConfig(erasing=1.0, mixup=0.8), Mix(0.3, None), _batch(8, 32)
    simple: dict[str, tuple[Compared, float]] = {
        "keyed uniform draws": (lambda d: keyed_random.uniform(keys.to(d), 3, 5), 0.0),
        "keyed normal draws": (lambda d: keyed_random.normal(keys.to(d), 9, shape=(16,)), 1e-5),
        "normalise, flip, erase": (lambda d: augment_on_device(_to(batch, d), augment), 1e-5),
        "mixup": (lambda d: mix_images(augment_on_device(_to(batch, d), augment), mix, batch.weights.to(d)), 1e-5),
    }
    for name, (compute, allowed) in simple.items():
        yield name, lambda c=compute, a=allowed: _facts(_same(c, device, a))
    for compiled in (False, True) if host.on_gpu else (False,):
        for tokens, connections in MECHANISMS:
            chosen = MergeSettings(merged=2) if tokens == "tome" else tokens
            settings = {"tokens": chosen, "connections": connections, "blocks": (1, 2), "compiled": compiled}
            for what in ("logits", "gradients"):
                name = f"{'compiled ' * compiled}{what}, {tokens}, {connections}"
                yield name, lambda w=what, s=settings: _facts(_same(lambda d: _passes(d, plan, w, **s), device, 2e-4))
    yield "kept patch ids (share that differs)", lambda: _facts(_kept_ids(device, plan))
    yield "forgetting keeps the same examples", lambda: _facts(_bookkeeping(device))
    for name, optimizer in (("AdamW", torch.optim.AdamW), ("SGD", partial(torch.optim.SGD, momentum=0.9, nesterov=True))):
        yield f"fused {name} leaves steps out on the device", lambda one=optimizer: _facts(_left_out(device, one))
    yield "CUDA graphs: the weights after four steps", lambda: _facts(_graphed(device))
    if host.on_gpu:
        yield "bf16 error against float64, ours / timm's", lambda: _facts(_bfloat16(device))


def _facts(found: Deviation) -> Facts:
    return {"ok": found.good, "difference": found.difference, "allowed": found.allowed}


def _same(compute: Compared, device: torch.device, allowed: float) -> Deviation:
    here, there = compute(torch.device("cpu")).double(), compute(device).cpu().double()
    return Deviation(float((here - there).abs().max() / here.abs().max().clamp(min=1e-12)), allowed)


def _batch(rows: int, size: int) -> Batch:
    rng = np.random.default_rng(0)
    erase = torch.tensor([[2, 3, 9, 11]] * rows, dtype=torch.int32)
    return Batch(
        images=torch.from_numpy(rng.integers(0, 256, (rows, 3, size, size), dtype=np.uint8)),
        labels=torch.arange(rows),
        ids=torch.arange(rows) + 1281166,
        copies=torch.zeros(rows, dtype=torch.int64),
        weights=torch.ones(rows),
        policy=torch.zeros(rows, 0, 2, dtype=torch.float64),
        flip=torch.arange(rows) % 2 == 0,
        erase=erase,
        jpeg=torch.zeros(rows, 0, dtype=torch.int32),
        rng_keys=torch.arange(rows) * 104729,
        broken=[],
    )


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(field.to(device) for field in batch[:-1]), broken=batch.broken)


def _network(device: torch.device, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit: Any = timm.create_model(
            "deit_tiny_patch16_224",
            img_size=32,
            patch_size=4,
            embed_dim=48,
            depth=4,
            num_heads=3,
            num_classes=10,
            drop_path_rate=0.1,
        )
        for parameter in vit.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return build.build(vit, **settings).to(device)


def _passes(device: torch.device, plan: Plan, what: str, compiled: bool = False, **settings: Any) -> Tensor:
    network = _network(device, **settings)
    if compiled and device.type == "cuda":  # beside the eager CPU
        network.compile()
    images = torch.from_numpy(np.random.default_rng(1).standard_normal((8, 3, 32, 32), dtype=np.float32)).to(device)
    logits = network(images, plan, rng_keys=torch.arange(8, device=device)).logits
    if what == "logits":
        return logits.detach()
    logits.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def _kept_ids(device: torch.device, plan: Plan) -> Deviation:
    images = torch.from_numpy(np.random.default_rng(2).standard_normal((8, 3, 32, 32), dtype=np.float32))
    here, there = (
        _network(d, tokens="topk", blocks=(1, 2)).eval()(images.to(d), plan, frozenset({"kept"})).kept
        for d in (torch.device("cpu"), device)
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
    for on in (False, True):
        settings = EngineConfig(kind="ddp", compile=True, cuda_graphs=on)
        network = _network(device, tokens="topk", blocks=(1, 2))
        if device.type == "cuda":
            network.compile(**({"mode": mode} if (mode := cuda_graphs.mode_of(settings)) else {}))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        images = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 8, 3, 32, 32), dtype=np.float32)).to(device)
        keys, sums = torch.arange(8, device=device), torch.zeros((), device=device)
        for step, plan in enumerate((Plan(), Plan(0.7), Plan(0.7), Plan())):
            cuda_graphs.begin_pass(settings)
            network(images[step], plan, rng_keys=keys).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            cuda_graphs.begin_pass(settings)
            with torch.no_grad():
                sums += network(images[step], plan, rng_keys=keys).logits.square().mean()
        results.append(torch.cat([sums[None], *(p.detach().flatten() for p in network.parameters())]).cpu().double())
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
    images = torch.from_numpy(np.random.default_rng(3).standard_normal((16, 3, 32, 32), dtype=np.float32)).to(device)
    ours = _network(device).eval()
    with torch.no_grad():
        exact = _network(device).double().eval().vit(images.double())
        with torch.autocast("cuda", torch.bfloat16):
            errors = [float((out.double() - exact).abs().max()) for out in (ours(images).logits, ours.vit(images))]
    return Deviation(errors[0] / max(errors[1], 1e-12), 2.0)
