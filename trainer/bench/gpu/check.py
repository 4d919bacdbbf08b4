"""`make gpu PART=check`: compare results of the GPU with those of the CPU, for every computation of a run on the device. Needs no
network. Without a GPU the CPU is compared with itself (the tests do that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from trainer.config.schema import AugmentConfig
from trainer.data.augment.mixup import Mix, mix_images
from trainer.data.augment.on_device import augment_on_device
from trainer.data.batch import Batch


class Deviation(NamedTuple):
    """One comparison: the largest difference and the allowed one."""

    what: str
    difference: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.difference <= self.allowed

    def text(self) -> str:
        return f"{'ok  ' if self.good else 'FAIL'}  {self.what:<58} {self.difference:.2e} (allowed {self.allowed:.0e})"


def check(device: torch.device) -> Iterator[Deviation]:
    """Compare every computation on the device with the CPU: random numbers, augmentation, forward and backward passes, bookkeeping."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    keys = torch.arange(512) * 7919 - 12345
    yield _same("keyed uniform draws", lambda d: keyed_random.uniform(keys.to(d), 3, 5), device, 0.0)
    yield _same("keyed normal draws", lambda d: keyed_random.normal(keys.to(d), 9, shape=(16,)), device, 1e-5)
    augment = AugmentConfig(erasing=1.0, mixup=0.8)
    batch = _batch(8, 32)
    yield _same("normalise, flip, erase", lambda d: augment_on_device(_to(batch, d), augment), device, 1e-5)
    mix = Mix(0.3, None)
    yield _same(
        "mixup", lambda d: mix_images(augment_on_device(_to(batch, d), augment), mix, batch.weights.to(d)), device, 1e-5
    )

    plan = Plan(0.7, 0.5)
    for tokens, connections in (("all", "all"), ("topk", "all"), ("topk", "exact"), ("topk", "shared_keys"), ("tome", "all")):
        for what in ("logits", "gradients"):
            name = f"{what} with tokens={tokens} connections={connections}"
            chosen = MergeSettings(merged=2) if tokens == "tome" else tokens
            settings = {"tokens": chosen, "connections": connections, "blocks": (1, 2)}
            yield _same(name, lambda d, w=what, s=settings: _passes(d, plan, w, **s), device, 2e-4)
    yield from _kept_ids(device, plan)
    yield _bookkeeping(device)
    if device.type == "cuda":
        yield from _bfloat16(device)


def _same(what: str, compute: Callable[[torch.device], Tensor], device: torch.device, allowed: float) -> Deviation:
    here, there = compute(torch.device("cpu")).double(), compute(device).cpu().double()
    return Deviation(what, float((here - there).abs().max() / here.abs().max().clamp(min=1e-12)), allowed)


def _batch(rows: int, size: int) -> Batch:
    rng = np.random.default_rng(0)
    erase = torch.tensor([[2, 3, 9, 11]] * rows, dtype=torch.int32)
    return Batch(
        images=torch.from_numpy(rng.integers(0, 256, (rows, 3, size, size), dtype=np.uint8)),
        labels=torch.arange(rows),
        ids=torch.arange(rows) + 1281166,
        copies=torch.zeros(rows, dtype=torch.int64),
        weights=torch.ones(rows),
        flip=torch.arange(rows) % 2 == 0,
        erase=erase,
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


def _passes(device: torch.device, plan: Plan, what: str, **settings: Any) -> Tensor:
    network = _network(device, **settings)
    images = torch.from_numpy(np.random.default_rng(1).standard_normal((8, 3, 32, 32), dtype=np.float32)).to(device)
    logits = network(images, plan, rng_keys=torch.arange(8, device=device)).logits
    if what == "logits":
        return logits.detach()
    logits.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def _kept_ids(device: torch.device, plan: Plan) -> Iterator[Deviation]:
    images = torch.from_numpy(np.random.default_rng(2).standard_normal((8, 3, 32, 32), dtype=np.float32))
    kept = [
        _network(d, tokens="topk", blocks=(1, 2)).eval()(images.to(d), plan, frozenset({"kept"})).kept
        for d in (torch.device("cpu"), device)
    ]
    for block in kept[0]:
        differ = (kept[0][block].sort(-1).values != kept[1][block].cpu().sort(-1).values).float().mean()
        yield Deviation(f"patch ids kept at block {block} (share that differs)", float(differ), 0.01)


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
    return Deviation("forgetting keeps the same examples", float(hashes[0] != hashes[1]), 0.0)


def _bfloat16(device: torch.device) -> Iterator[Deviation]:
    """bf16 autocast: our error against float64 is at most twice timm's own (docs/laws.md, law 1)."""
    images = torch.from_numpy(np.random.default_rng(3).standard_normal((16, 3, 32, 32), dtype=np.float32)).to(device)
    ours = _network(device).eval()
    with torch.no_grad():
        exact = _network(device).double().eval().vit(images.double())
        with torch.autocast("cuda", torch.bfloat16):
            errors = [float((out.double() - exact).abs().max()) for out in (ours(images).logits, ours.vit(images))]
    yield Deviation("bf16 error against float64, ours / timm's", errors[0] / max(errors[1], 1e-12), 2.0)


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (no CUDA device: the CPU is compared with itself)"
    print(f"check on {where}, torch {torch.__version__}, timm {timm.__version__}")
    bad = 0
    for finding in check(device):
        print(finding.text(), flush=True)
        bad += not finding.good
    return int(bad > 0)
