"""Step times of several networks in one process, interleaved, so that a drifting machine drifts for all: only ratios count."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from sparsity.types import DENSE, Plan
from sparsity.vit import SparseViT

WARM_UP = 3


def paired(
    networks: dict[str, Callable[[], Any]],
    plans: dict[str, Plan],
    device: torch.device,
    images: int,
    size: int,
    rounds: int,
    base: str,
    precision: torch.dtype | None = torch.bfloat16,
) -> dict[str, Any]:
    """Time forward + backward + AdamW step of each network `rounds` times, one after the other in every round.

    {row: {median, min, max, unit: "ms", images_per_second, ratio (median over rounds of row / base), ratio_min, ratio_max,
    peak_mib (CUDA)}}. precision: of autocast on a GPU; a CPU computes in float32.
    """
    autocast = device.type == "cuda" and precision is not None
    inputs = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    steps = {}
    for row, make in networks.items():
        network = make().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
        steps[row] = _step(network, optimizer, inputs, plans.get(row, DENSE), device, autocast)
    times: dict[str, list[float]] = {row: [] for row in steps}
    peaks: dict[str, float] = {}
    for row, one in steps.items():
        for _ in range(WARM_UP):
            one()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            one()
            peaks[row] = torch.cuda.max_memory_allocated(device) / 2**20
    for _ in range(rounds):
        for row, one in steps.items():
            times[row].append(one())
    found = {}
    for row, seconds in times.items():
        ratios = [mine / its for mine, its in zip(seconds, times[base], strict=True)]
        found[row] = {
            "median": 1000 * median(seconds),
            "min": 1000 * min(seconds),
            "max": 1000 * max(seconds),
            "unit": "ms",
            "images_per_second": images / median(seconds),
            "ratio": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "peak_mib": peaks.get(row),
        }
    return found


def _step(
    network: Any, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, plan: Plan, device: torch.device, autocast: bool
) -> Callable[[], float]:
    labels = torch.arange(len(inputs), device=device) % 10

    def one() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = network(inputs, plan).logits if isinstance(network, SparseViT) else network(inputs)
        F.cross_entropy(out.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return one


def report(rows: dict[str, Any], base: str) -> str:
    """The rows as text: time, rate, and the ratio to `base` with its range."""
    wide = max(len(row) for row in rows)
    lines = [f"{'':{wide}}  {'ms':>9}  {'images/s':>9}  {'/ ' + base:>8}  {'range':>15}  {'peak MiB':>9}"]
    for row, r in rows.items():
        peak = f"{r['peak_mib']:9.0f}" if r["peak_mib"] else f"{'-':>9}"
        spread = f"{r['ratio_min']:.3f} - {r['ratio_max']:.3f}"
        lines.append(f"{row:{wide}}  {r['median']:9.2f}  {r['images_per_second']:9.0f}  {r['ratio']:8.3f}  {spread:>15}  {peak}")
    return "\n".join(lines)
