"""`trilevel bench gpu-counts CONFIG`: what a training step would launch and move on an H200, without one: kernels, bytes, products, and the
time that they predict.

Each row is a network of the configuration under a plan, lowered by inductor (`lowering`), forward and backward. The prediction adds, kernel
by kernel, the longer of its bytes and its arithmetic at the rates below; fused attention computes whole tiles. Nothing here was measured on
a GPU: the rates are those that an H200 reaches in public measurements, and `make gpu PART=step` prints the measured time beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsity.build import build
from sparsity.network import SparseNetwork
from sparsity.types import DENSE, Plan
from trainer.bench.gpu import lowering, pretended
from trainer.bench.gpu.lowering import Kernel
from trainer.bench.result import BenchResult
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.progress import tracked
from trainer.model import weights

BYTES = 4.0e12  # per second, of 4.8e12
PRODUCTS = 550e12  # FLOP/s in bf16, of 989e12: what DeiT's shapes reach, of 788e12 in large products
ATTENTION = 400e12  # FLOP/s of a fused kernel in bf16 over whole tiles (cuDNN; flash-attention 2 reaches 220e12)
TILE = 64  # queries and keys of a tile
BACKWARD = 2.5  # products of attention's backward pass to those of its forward pass: 5 to 2
OPTIMIZER = 28  # bytes per parameter of fused AdamW: reads weight, gradient, two moments; writes weight and moments
AVERAGE = 12  # of the average: reads weight and average, writes it
COLUMNS = {
    "kernels": "{kernels}",
    "GB": "{gigabytes:.1f}",
    "MB/image": "{megabytes_per_image:.0f}",
    "product TFLOP": "{teraflops:.2f}",
    "predicted ms": "{predicted_ms:.2f}",
    "images/s": "{images_per_second:.0f}",
    "of dense": "{of_dense:.3f}",
}


@dataclass(frozen=True)
class Row:
    """A network with mechanisms and the plan of its step. residual: of the tokens between blocks. timm: the timm network itself, without
    drop path, whose random numbers cannot be traced on a CPU."""

    tokens: str = "all"
    connections: str = "all"
    plan: Plan = DENSE
    residual: torch.dtype | None = None
    timm: bool = False


def rows() -> dict[str, Row]:
    """Dense rows, then token keep ratios in the blocks of the configuration, then connections beside the ratio .7, then ToMe at .7."""
    ratios, half = (0.9, 0.7, 0.5), torch.bfloat16
    found = {"timm": Row(timm=True), "dense": Row(), "dense, bf16 residual": Row(residual=half)}
    found |= {f"tokens {keep}": Row("topk", plan=Plan(keep)) for keep in ratios}
    found |= {f"tokens {keep}, bf16 residual": Row("topk", plan=Plan(keep), residual=half) for keep in ratios}
    found |= {f"tokens 0.7, {name} 0.1": Row("topk", name, Plan(0.7, 0.1)) for name in ("exact", "shared_keys")}
    found["ToMe 0.7"] = Row("tome", plan=Plan(0.7))
    return found


def bench(config: Config, only: list[str] | None = None) -> BenchResult:
    """Lower and count every row at data.micro_batch images. only: these rows, and `dense`. Raises ConfigError for an unknown row, and for a
    network whose settings a row does not fit."""
    known = rows()
    if unknown := [name for name in only or [] if name not in known]:
        raise ConfigError(f"--rows: unknown value {'; '.join(unknown)!r}; valid values: {'; '.join(known)}")
    chosen = {name: row for name, row in known.items() if only is None or name in {"dense", *only}}
    found: dict[str, dict[str, Any]] = {}
    with pretended.h200():
        for name in tracked(list(chosen), f"bench gpu-counts {config.name}", len(chosen), "rows"):
            found[name] = counted(config, chosen[name])
    for row in found.values():
        row["of_dense"] = row["predicted_ms"] / found["dense"]["predicted_ms"]
    images = config.data.micro_batch
    title = f"{config.name}: {config.model.name}, {config.model.image_size} px, {images} images, bf16 autocast, predicted for an H200"
    notes = [
        f"forward, backward, fused AdamW and average; {BYTES / 1e12:g} TB/s, {PRODUCTS / 1e12:g} TFLOP/s, attention in tiles of {TILE} at "
        f"{ATTENTION / 1e12:g} TFLOP/s; without loss, augmentation and bookkeeping. Counted from torch {torch.__version__}'s graphs, not "
        "measured on a GPU"
    ]
    return BenchResult(title, found, COLUMNS, notes)


def counted(config: Config, row: Row) -> dict[str, Any]:
    """The numbers of a row; inside `pretended.h200()`. Raises ConfigError for a network that has no such mechanisms."""
    model = network_of(config, row)
    graphs = lowering.lower(*_step(model, config, row), code=False)
    kernels = [kernel for graph in graphs for kernel in graph.kernels]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    around = trained * (OPTIMIZER + (AVERAGE if config.optim.ema else 0))
    images, moved = config.data.micro_batch, sum(kernel.bytes for kernel in kernels)
    seconds = sum(map(predicted, kernels)) + around / BYTES
    return {
        "kernels": len(kernels),
        "gigabytes": moved / 1e9,
        "megabytes_per_image": moved / 1e6 / images,
        "teraflops": sum(kernel.flops for kernel in kernels) / 1e12,
        "attention_teraflops": sum(map(attention_flops, kernels)) / 1e12,
        "predicted_ms": 1000 * seconds,
        "images_per_second": images / seconds,
    }


def predicted(kernel: Kernel) -> float:
    """Seconds: the longer of memory and arithmetic."""
    return max(kernel.bytes / BYTES, kernel.flops / PRODUCTS, attention_flops(kernel) / ATTENTION)


def attention_flops(kernel: Kernel) -> float:
    """FLOPs of a fused attention in whole tiles; 0 for other kernels."""
    if kernel.attention is None:
        return 0.0
    rows, queries, keys, width, backward = kernel.attention
    whole = [-(-length // TILE) * TILE for length in (queries, keys)]
    return 4.0 * rows * whole[0] * whole[1] * width * (BACKWARD if backward else 1.0)


def network_of(config: Config, row: Row, timms_drop_path: bool = False) -> SparseNetwork:
    """The network of a row, in training mode, with random weights; selections in the blocks of the configuration, by default 3, 6 and 9.
    timms_drop_path: as configured; without, timm's network can be traced on a CPU."""
    settings = config.model.model_copy(
        update={"init": "random"} | ({"drop_path": 0.0} if row.timm and not timms_drop_path else {})
    )
    blocks = list(config.tokens.blocks) or [3, 6, 9]
    try:
        network = weights.create(settings, config.seed)
        model = build(network, tokens=row.tokens, connections=row.connections, blocks=blocks if row.tokens != "all" else ())
    except ValueError as error:
        raise ConfigError(f"model.name={config.model.name}: {error}") from error
    model.residual = row.residual
    return model.train()


def _step(model: SparseNetwork, config: Config, row: Row) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    size, images = config.model.image_size, config.data.micro_batch

    def forward(pixels: Tensor, keys: Tensor) -> Tensor:
        return model.network(pixels) if row.timm else model(pixels, row.plan, frozenset(), keys).logits

    return forward, torch.empty(images, 3, size, size), torch.arange(images)
