"""What `make gpu PART=check` compares: a deviation and its limit, a small batch and a small network, the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor

from sparsity import build
from sparsity.tokens.tome import MergeSettings
from sparsity.types import Plan
from trainer.bench.gpu.report import Facts
from trainer.data.batch import Batch

Results = Tensor | tuple[Tensor, ...]
Compared = Callable[[torch.device], Results]
CPU = torch.device("cpu")
PLAN = Plan(0.7, 0.5)
MECHANISMS: dict[tuple[str, str], dict[str, Any]] = {
    (tokens, connections): {"tokens": MergeSettings(merged=2) if tokens == "tome" else tokens, "connections": connections, "blocks": (0, 1)}
    for tokens, connections in (
        ("all", "all"), ("topk", "all"), ("topk", "exact"), ("topk", "shared_keys"), ("tome", "all"), ("random", "all")
    )
}  # fmt: skip
"""{(level 2, level 3): settings of `network`}"""
TOP_K = MECHANISMS["topk", "all"]


class Deviation(NamedTuple):
    """The largest difference of a comparison, and the allowed one."""

    difference: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.difference <= self.allowed

    def facts(self) -> Facts:
        return {"ok": self.good, "difference": self.difference, "allowed": self.allowed}


def same(compute: Compared, device: torch.device, allowed: float) -> Deviation:
    """The device beside the CPU."""
    return deviation(compute(CPU), compute(device), allowed)


def deviation(expected: Results, found: Results, allowed: float) -> Deviation:
    """The largest difference as a part of the largest expected number; of several results the worst."""
    return Deviation(max(map(relative, _several(expected), _several(found))), allowed)


def relative(expected: Tensor, found: Tensor) -> float:
    """Not a number is infinitely far."""
    here, there = expected.cpu().double(), found.cpu().double()
    difference = float((here - there).abs().max() / here.abs().max().clamp(min=1e-12))
    return difference if difference == difference else float("inf")


def _several(result: Results) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def batch(rows: int, size: int) -> Batch:
    """Random pixels; every second image is flipped, and a box of each is erased."""
    rng = np.random.default_rng(0)
    return Batch(
        images=torch.from_numpy(rng.integers(0, 256, (rows, 3, size, size), dtype=np.uint8)),
        labels=torch.arange(rows),
        ids=torch.arange(rows) + 1281166,
        copies=torch.zeros(rows, dtype=torch.int64),
        weights=torch.ones(rows),
        policy=torch.zeros(rows, 0, 2, dtype=torch.float64),
        flip=torch.arange(rows) % 2 == 0,
        erase=torch.tensor([[2, 3, 9, 11]] * rows, dtype=torch.int32),
        jpeg=torch.zeros(rows, 0, dtype=torch.int32),
        rng_keys=torch.arange(rows) * 104729,
        broken=[],
    )


def on(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(field.to(device) for field in batch[:-1]), broken=batch.broken)


def network(device: torch.device, **settings: Any) -> Any:
    """A ViT of three blocks for images of 32 x 32 and 10 classes, its weights random. settings: of `sparsity.build`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit: Any = timm.create_model(
            "deit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=10, drop_path_rate=0.1
        )  # fmt: skip
        for parameter in vit.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return build.build(vit, **settings).to(device)


def pixels(seed: int, rows: int, device: torch.device) -> Tensor:
    """(rows, 3, 32, 32) float32."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 3, 32, 32), dtype=np.float32)).to(device)


def passes(model: Any, images: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Logits (b, C), and the gradients of all parameters one behind the other, of the mean of the squared logits. Keys of the draws: the
    numbers of the rows."""
    logits = model(images, plan, rng_keys=torch.arange(len(images), device=images.device)).logits
    logits.float().square().mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
