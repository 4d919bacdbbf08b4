"""`trilevel bench inference CONFIG`: images/s of forward passes at one density, compared with timm's dense model and with peers.

Random images, no loader, fused attention on both sides, networks interleaved. Peers have the multiply-adds of the value-based row: EViT
(keep ratio over three blocks, with fusion) and ToMe (a number of merged tokens in every block). For the adaptive rows the number of tokens
of each image is drawn around the density, because the importance of random images is flat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.adaptive import AdaptiveViT
from sparsity.build import build
from sparsity.cost import cost_with, shape_of
from sparsity.network import SparseNetwork
from sparsity.tokens.mass import LEAST
from sparsity.tokens.tome import MergeSettings
from sparsity.tokens.topk import TopKSettings
from sparsity.types import DENSE, Plan
from sparsity.vit import SparseViT
from trainer.bench.paired import interval, resident_peak, warmed_up
from trainer.bench.result import BenchResult, stats
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.model import weights
from trainer.model.build import cost_of
from trainer.telemetry import timing
from trainer.telemetry.energy import EnergyMeter

SPREAD = 0.13  # standard deviation of an image's density: 25 of 196 tokens, the middle of what SaiT's mass-based selection gave
COLUMNS = {
    "ms": "{median:.2f}",
    "images/s": "{images_per_second:.1f}",
    "speedup over timm": "{speedup:.3f}",
    "95 % interval": "{speedup_low:.3f} - {speedup_high:.3f}",
    "bound": "{bound:.3f}",
    "tokens": "{tokens:.4g}",
    "peak MiB": "{peak_mib:.1f}",
    "J/image": "{joules:.3g}",
}


@dataclass(frozen=True)
class Row:
    """run: a forward pass over images (B, 3, S, S). gmacs: mean over the images. tokens: mean in the last block, with prefix.

    bytes: of the weights, or of the file. lean: where another library than torch allocates, the same pass with a library that returns
    its memory after it; its peak is that of the process.
    """

    run: Callable[[Tensor], Any]
    gmacs: float
    tokens: float
    bytes: int | None = None
    lean: Callable[[Tensor], Any] | None = None


def bench(config: Config, density: float, batches: list[int], rounds: int) -> BenchResult:
    """Measure on this machine's GPU, or else its CPU (float32), at the pruning block of `config`. Raises ConfigError."""
    if not 0.0 < density < 1.0:
        raise ConfigError(f"--density {density:g}: must be in (0, 1)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit: Any = weights.create(config.model.model_copy(update={"init": "random"}), config.seed).to(device).eval()
    if why := SparseViT.why_not(vit):
        raise ConfigError(f"bench inference: model.name={config.model.name}: {why}")
    half = device.type == "cuda" and config.engine.precision != "float32"
    found: dict[str, dict[str, Any]] = {}
    for batch in batches:
        images = torch.randn(batch, 3, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(0)).to(device)
        rows = _rows(config, vit, density, batch)
        found |= {f"{batch} x {name}": facts for name, facts in measured(rows, images, rounds, half, batch).items()}
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, float32"
    compiled = "torch.compile of all but the adaptive rows, " if config.engine.compile else "eager, "
    title = (
        f"{config.model.name}, {config.model.image_size} px, density {density:g} after block {_block(config)}, {compiled}"
        f"{'bf16 autocast, ' if half else ''}{rounds} rounds, {kind}"
    )
    notes = [
        "row: batch size x network.",
        "bound: speedup if time followed multiply-adds. Peers: as many multiply-adds as topk.",
        f"mass rows: tokens per image drawn with standard deviation {SPREAD:g} of all patches, same mean.",
    ]
    return BenchResult(title, found, COLUMNS, notes)


def _block(config: Config) -> int:
    if len(config.tokens.blocks) != 1:
        raise ConfigError(f"tokens.blocks={list(config.tokens.blocks)}: give one early block, e.g. tokens.blocks=[2]")
    return config.tokens.blocks[0]


def _rows(config: Config, vit: Any, density: float, batch: int) -> dict[str, Row]:
    block, plan = _block(config), Plan(density)
    value = build(vit, tokens=TopKSettings(keep=density), blocks=(block,), position="block")
    whole, cost = cost_of(value, DENSE), cost_of(value, plan)
    assert isinstance(value, SparseViT)
    dense, shape, num = SparseViT(vit), shape_of(value), vit.patch_embed.num_patches
    mean = cost["tokens"][-1] - vit.num_prefix_tokens
    counts = _counts(batch, mean, num).to(next(vit.parameters()).device)
    work = sum(cost_with(shape, int(count)).total for count in counts) / batch
    rows = {
        "timm": Row(vit, whole["multiply_adds"], whole["tokens"][-1]),
        "ours dense": Row(_under(dense, DENSE), whole["multiply_adds"], whole["tokens"][-1]),
        f"topk {density:g}": Row(_under(value, plan), cost["multiply_adds"], cost["tokens"][-1]),
    }
    tokens = float(counts.double().mean()) + vit.num_prefix_tokens
    for execution in ("packed", "padded"):
        adaptive = AdaptiveViT(value, execution=execution)
        rows[f"mass {density:g}, {execution}"] = Row(_adaptive(adaptive, counts), work, tokens)
    peers: list[SparseNetwork] = []
    for name, (model, its) in {"EViT": _evit(vit, cost["multiply_adds"]), "ToMe": _tome(vit, cost["multiply_adds"])}.items():
        about = cost_of(model, its)
        rows[name] = Row(_under(model, its), about["multiply_adds"], about["tokens"][-1])
        peers.append(model)
    if config.engine.compile:
        compiled = torch.compile(vit, dynamic=False)
        rows["timm"] = Row(compiled, whole["multiply_adds"], whole["tokens"][-1])
        for model in (dense, value, *peers):
            model.compile()
    return rows


def measured(rows: dict[str, Row], images: Tensor, rounds: int, half: bool, batch: int) -> dict[str, dict[str, Any]]:
    device = images.device

    def once(row: Row) -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            row.run(images)

    meter = EnergyMeter(device)
    joules: dict[str, list[float]] = {name: [] for name in rows}
    passes = {name: _timed(once, row, device, meter, joules[name]) for name, row in rows.items()}
    show = f"bench inference, batch {batch}"
    peaks = warmed_up(passes, device, show)
    times = timing.interleave(passes, rounds, show=show)
    found = {}
    for name, seconds in times.items():
        speedups = [dense / mine for mine, dense in zip(seconds, times["timm"], strict=True)]
        low, high = interval(speedups)
        found[name] = stats([1000 * one for one in seconds], "ms") | {
            "batch": batch,
            "images_per_second": batch / median(seconds),
            "speedup": median(speedups),
            "speedup_low": low,
            "speedup_high": high,
            "bound": rows["timm"].gmacs / rows[name].gmacs,
            "tokens": rows[name].tokens,
            "gmacs": rows[name].gmacs / 1e9,
            "bytes": rows[name].bytes,
            "peak_mib": _mib(resident_peak(partial(lean, images)) if (lean := rows[name].lean) else peaks[name]),
            "joules": median(joules[name][-rounds:]) / batch if meter.source else None,
        }
    return found


def _timed(
    once: Callable[[Row], None], row: Row, device: torch.device, meter: EnergyMeter, joules: list[float]
) -> Callable[[], float]:
    """A pass that returns its seconds and appends its energy to `joules`."""

    def run() -> float:
        before = meter.joules()
        seconds = timing.seconds(lambda: once(row), device)
        joules.append(meter.joules() - before)
        return seconds

    return run


def _mib(found: float | None) -> float | None:
    return None if found is None else found / 2**20


def _under(model: nn.Module, plan: Plan) -> Callable[[Tensor], Any]:
    return lambda images: model(images, plan)


def _adaptive(model: AdaptiveViT, counts: Tensor) -> Callable[[Tensor], Any]:
    def run(images: Tensor) -> Any:
        tokens, ranked = model.ranked(images)
        return model.finish(tokens, ranked.order, counts)

    return run


def _counts(batch: int, mean: int, num: int) -> Tensor:
    """Tokens of each image, (batch,) int64, with that mean exactly, none above `num`: normal quantiles, shuffled."""
    levels = (torch.arange(batch, dtype=torch.float64) + 0.5) / batch
    spread = torch.special.ndtri(levels) * SPREAD * num
    least = min(LEAST, mean)
    counts = (mean + spread).round().clamp(least, num).long()
    counts = counts[torch.randperm(batch, generator=torch.Generator().manual_seed(1))]
    while short := mean * batch - int(
        counts.sum()
    ):  # from the clamp: even it out, one token per image that is not at its bound
        free = (counts < num if short > 0 else counts > least).nonzero().flatten()[: abs(short)]
        counts[free] += 1 if short > 0 else -1
    return counts


def _evit(vit: Any, wanted: float) -> tuple[SparseNetwork, Plan]:
    """EViT at its three blocks, with the keep ratio (in hundredths) whose multiply-adds are nearest to `wanted`."""
    depth = len(vit.blocks)
    model = build(vit, tokens=TopKSettings(keep=0.5, fuse=True), blocks=sorted({depth // 4, depth // 2, 3 * depth // 4}))
    plans = [Plan(ratio / 100) for ratio in range(20, 100)]
    return model, min(plans, key=lambda plan: abs(cost_of(model, plan)["multiply_adds"] - wanted))


def _tome(vit: Any, wanted: float) -> tuple[SparseNetwork, Plan]:
    """ToMe in every block, with the number of merged tokens whose multiply-adds are nearest to `wanted`."""
    every = range(len(vit.blocks))
    most = max(1, vit.patch_embed.num_patches // 2)
    models = [build(vit, tokens=MergeSettings(keep=0.5, merged=r), blocks=every) for r in range(1, most)]
    plan = Plan(0.5)
    return min(models, key=lambda model: abs(cost_of(model, plan)["multiply_adds"] - wanted)), plan
