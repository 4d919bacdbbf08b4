"""Step times of several networks in one process, interleaved, so that drift affects all alike; only ratios are meaningful."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import quantile_test
from torch import nn
from torch.nn import functional as F

from sparsity.network import SparseNetwork
from sparsity.types import DENSE, Plan
from trainer.bench.result import stats
from trainer.data.progress import tracked
from trainer.telemetry import timing
from trainer.telemetry.timing import interleave

WARM_UP = 3
LONG = 2.0  # seconds of a row that is warm after one call
CONFIDENCE = 0.95
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class TimedPlan:
    """The computation of a row: a network (rows may share networks or weights) under a plan; share: its multiply-adds / the base's."""

    network: nn.Module
    plan: Plan = DENSE
    share: float | None = None


def paired(
    rows: dict[str, TimedPlan],
    device: torch.device,
    images: int,
    size: int,
    rounds: int,
    base: str,
    *,
    optimizer: Optimizer,
    precision: torch.dtype | None = torch.bfloat16,
    show: str | None = None,
) -> dict[str, Any]:
    """Time forward, backward and optimizer step of each row `rounds` times, interleaved, each round in a different order.

    rows: {name: network and plan}.
    device: of the networks.
    images, size: batch size and image size in pixels.
    rounds: measured steps per row.
    base: the row that ratios refer to.
    optimizer: builds the optimizer of a network.
    precision: of autocast on a GPU; a CPU computes in float32.
    show: title of the progress, on standard error.
    Returns {row: {median, min, max, unit: "ms", images_per_second, ratio (median over rounds of row / base), ratio_low, ratio_high (95 %
    interval of that median, by order statistics), ratio_min, ratio_max, share, peak_mib; of_timm and of_timm_interval if there is a
    row `timm`}}. peak_mib: peak memory of a step beyond weights and optimizer state.
    """
    autocast = device.type == "cuda" and precision is not None
    inputs = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    optimizers: dict[int, torch.optim.Optimizer] = {}
    steps: dict[str, Callable[[], float]] = {}
    for name, row in rows.items():
        network = row.network.to(device).train()
        weights = id(next(network.parameters()))
        if weights not in optimizers:
            optimizers[weights] = optimizer(network)
        steps[name] = _step(network, optimizers[weights], inputs, row.plan, device, autocast)
    peaks = warmed_up(steps, device, show)
    times = interleave(steps, rounds, show=show)
    found = {}
    for name, seconds in times.items():
        ratios = [mine / its for mine, its in zip(seconds, times[base], strict=True)]
        low, high = interval(ratios)
        found[name] = stats([1000 * one for one in seconds], "ms") | {
            "images_per_second": images / median(seconds),
            "ratio": median(ratios),
            "ratio_low": low,
            "ratio_high": high,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "share": rows[name].share,
            "peak_mib": peaks[name] / 2**20,
        }
        if "timm" in times:
            ratios = [mine / its for mine, its in zip(seconds, times["timm"], strict=True)]
            found[name]["of_timm"], found[name]["of_timm_interval"] = median(ratios), interval(ratios)
    return found


def warmed_up(rows: Mapping[str, Callable[[], Any]], device: torch.device, show: str | None) -> dict[str, float]:
    """Call every row a few times, a long one once; {row: its peak memory, see `peak`}."""
    peaks: dict[str, float] = {}
    long: set[str] = set()
    turns = [(name, number) for name in rows for number in range(WARM_UP + 1)]
    for name, number in tracked(turns, f"{show}, warm-up", len(turns), "passes", show is not None):
        if number < WARM_UP:
            if name not in long:
                started = time.perf_counter()
                rows[name]()
                if time.perf_counter() - started > LONG:
                    long.add(name)
        else:
            peaks[name] = peak(rows[name], device)
    return peaks


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median by order statistics, for any distribution; the range for fewer than 6 values."""
    if len(values) < 6:
        return min(values), max(values)
    low, high = quantile_test(values, p=0.5).confidence_interval(CONFIDENCE)
    return float(low), float(high)


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    plan: Plan,
    device: torch.device,
    autocast: bool,
) -> Callable[[], float]:
    labels = torch.arange(len(inputs), device=device) % 2
    rng_keys = torch.arange(len(inputs), device=device)  # a run keys drop path by example; its cost is part of the step

    def one() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = network(inputs, plan, frozenset(), rng_keys).logits if isinstance(network, SparseNetwork) else network(inputs)
        F.cross_entropy(out.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: timing.seconds(one, device)


def peak(one: Callable[[], Any], device: torch.device) -> float:
    """Peak bytes that a step allocates beyond what was allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        one()
        return torch.cuda.max_memory_allocated(device) - before
    # torch records no peak on a CPU; the profiler records every allocation, in order
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start and end on stderr otherwise
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiler:
        one()
    results: Any = profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))


def resident_peak(one: Callable[[], Any]) -> int | None:
    """Bytes by which the process grows at the peak of a call, for libraries whose allocations torch does not count; None where Linux does
    not record it. What the library keeps between two calls is not counted."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory of earlier calls is used again without growth
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        one()
        return _status("VmHWM") - before
    except (OSError, AttributeError, StopIteration):
        return None


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
