"""`make gpu PART=profile`: where the time of a compiled step goes: by class of kernel, idle, and the largest kernels; then what a step
computes beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.bench.gpu import beyond, counts, step
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.telemetry.timing import synchronize

STEPS, LARGEST = 5, 15
# of a kernel's name, in lower case; the first that fits
CLASSES = (
    ("copy", ("memcpy", "memset")),
    ("communication", ("nccl",)),
    ("attention", ("flash", "fmha", "sdpa", "attention", "cudnn_generated_fort")),
    ("optimizer", ("adam", "multi_tensor", "foreach", "lerp")),
    ("convolution", ("conv", "dgrad", "wgrad", "implicit")),  # before products: its kernels are called implicit_gemm
    (
        "product",
        ("gemm", "cutlass", "xmma", "nvjet", "cublas", "splitk", "addmm", "bmm", "::mm"),
    ),  # a bare mm is in "gamma" too
    ("sort and gather", ("sort", "gather", "scatter", "index")),
    ("reduction and norm", ("reduce", "norm")),
    ("elementwise", ("elementwise", "vectorized")),
)
TRITON = {"poi": "elementwise", "red": "reduction and norm", "per": "reduction and norm", "tem": "product", "mm": "product"}


def part(host: Host) -> Iterator[Row]:
    torch.set_float32_matmul_precision("high")
    config = step.configured(host)
    for name in ("dense", "tokens 0.7"):
        yield name, lambda name=name: _row(host, step.step_of(host, config, counts.rows()[name])[0])
    yield from beyond.rows(host, config)


def _row(host: Host, one: Callable[[], None]) -> Facts:
    for _ in range(1 if host.tiny else 5):
        one()
    return profiled(host.device, one, 1 if host.tiny else STEPS)


def profiled(device: torch.device, one: Callable[[], None], steps: int = STEPS) -> Facts:
    """`summary` of a step that has run before; on a CPU its operations stand for kernels."""
    on_gpu = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        for _ in range(steps):
            one()
        synchronize(device)
    where = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events: Any = profiler.profiler
    spans = [
        (e.name(), e.start_ns(), e.end_ns())
        for e in events.kineto_results.events()
        if e.device_type() == where and not e.is_user_annotation()  # spans of record_function are on the device too
    ]
    return summary(spans, steps)


def summary(spans: list[tuple[str, int, int]], steps: int) -> Facts:
    """Of (name, begin, end in ns) of kernels: ms per step by class, launches, share of idle time between the first and the last, and the
    largest kernels as [name, ms per step, launches per step]."""
    by_class: dict[str, float] = {}
    by_name: dict[str, list[int]] = {}
    for name, begin, end in spans:
        kind = class_of(name)
        by_class[kind] = by_class.get(kind, 0.0) + (end - begin) / 1e6 / steps
        by_name.setdefault(name, []).append(end - begin)
    busy, reach = 0, 0
    for _, begin, end in sorted(spans, key=lambda span: span[1]):
        busy += max(0, end - max(begin, reach))
        reach = max(reach, end)
    whole = max(reach - min((begin for _, begin, _ in spans), default=0), 1)
    largest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LARGEST]
    return {
        "ms": whole / 1e6 / steps,
        "idle": 1 - busy / whole,
        "launches": len(spans) / steps,
        **{f"{kind}_ms": ms for kind, ms in sorted(by_class.items(), key=lambda item: -item[1])},
        "largest": [[name[:60], sum(times) / 1e6 / steps, len(times) / steps] for name, times in largest],
    }


def class_of(kernel: str) -> str:
    """The class of a kernel by its name; "other" for one that fits none. inductor's kernels have their kind in front, then all operations
    that they fuse."""
    name = kernel.lower()
    if name.startswith("triton_"):
        return TRITON.get(name.split("_")[1], "other")
    return next(itertools.chain((kind for kind, words in CLASSES if any(word in name for word in words)), ["other"]))
