"""`make gpu PART=facts`: what the device reaches: memory, matrix products at DeiT's shapes, fused attention by backend and token count."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

from sparsity.attention_kernel import AttentionShape
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.engine import attention_backend
from trainer.telemetry.hardware import matrix_rate
from trainer.telemetry.timing import synchronize

IMAGES, WIDTH, HEADS = 256, 384, 6  # DeiT-S
LENGTHS = (197, 178, 161, 145, 139, 98, 69)  # tokens with [CLS]: dense, and at keep ratios of the recipes
MASKS = {
    "": (False, False),
    " that hides pairs": (True, False),
    " that weighs keys": (False, True),
}  # the latter two: exact and ToMe
FLEX = (197, 139)  # lengths at which torch's flex attention, a compiled Triton kernel, is timed beside them
SHAPES = {"qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "fc1": (WIDTH, 4 * WIDTH), "fc2": (4 * WIDTH, WIDTH)}


def part(host: Host) -> Iterator[Row]:
    yield "host", lambda: _host(host)
    yield "copy", lambda: _copy(host)
    yield "product, large", lambda: {"teraflops": matrix_rate(host.device, "autocast") / 1e12}
    tokens = (8 if host.tiny else IMAGES) * LENGTHS[0]
    for name, shape in SHAPES.items():
        yield f"product, {name} of {tokens} tokens", lambda shape=shape: _products(host, tokens, *shape)
    for length in LENGTHS[-1:] if host.tiny else LENGTHS:
        for name, (hides, weighs) in MASKS.items():
            yield f"attention{name}, {length} tokens", partial(_attention, host, length, hides, weighs)
        if host.on_gpu and length in FLEX:
            yield f"attention, flex, {length} tokens", partial(_flex_attention, host, length)


def timed(one: Callable[[], Any], device: torch.device, times: int = 10, blocks: int = 3) -> float:
    """Seconds of one call: the best of several blocks of `times` calls between two synchronisations, after two calls to warm up."""
    best = float("inf")
    for _ in range(2):
        one()
    for _ in range(blocks):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(times):
            one()
        synchronize(device)
        best = min(best, (time.perf_counter() - started) / times)
    return best


def _host(host: Host) -> Facts:
    about: Facts = {
        "device": torch.cuda.get_device_name(host.device) if host.on_gpu else f"CPU ({platform.machine()})",
        "cores": len(os.sched_getaffinity(0)),
        "free_shm_gib": shutil.disk_usage("/dev/shm").free / 2**30,  # workers hand over their batches there
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    if host.on_gpu:
        properties = torch.cuda.get_device_properties(host.device)
        about |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "sms": properties.multi_processor_count}
        about |= {"memory_gib": properties.total_memory / 2**30, "driver": _driver()}
    return about


def _driver() -> str:
    """The driver's version; empty where nvidia-smi does not say it."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _copy(host: Host) -> Facts:
    source = torch.empty(2**20 if host.tiny else 2**31, dtype=torch.uint8, device=host.device)
    target = torch.empty_like(source)
    return {"terabytes_per_second": 2 * source.numel() / timed(lambda: target.copy_(source), host.device) / 1e12}


def _products(host: Host, tokens: int, inside: int, outside: int) -> Facts:
    """The three products of a linear layer: forward, gradient of its input, gradient of its weight."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=host.device).to(torch.bfloat16)

    x, weight, gradient = random(tokens, inside), random(outside, inside), random(tokens, outside)
    products = {"forward": lambda: x @ weight.T, "input": lambda: gradient @ weight, "weight": lambda: gradient.T @ x}
    flops = 2.0 * tokens * inside * outside
    times = 1 if host.tiny else 20
    return {f"{name}_teraflops": flops / timed(one, host.device, times) / 1e12 for name, one in products.items()}


def _attention(host: Host, length: int, hides: bool, weighs: bool) -> Facts:
    """Milliseconds of the forward and backward pass of one block's attention by each kernel that takes it, timed as at the start of a run,
    and the rate of the fastest."""
    images, shape = 2 if host.tiny else IMAGES, AttentionShape(HEADS, length, WIDTH // HEADS, hides, weighs)
    found = attention_backend.measured(host.device, images, [shape], torch.bfloat16)[shape]
    return {f"{name}_ms": ms for name, ms in found.items()} | _rate(images, length, min(found.values()) / 1000)


def _flex_attention(host: Host, length: int) -> Facts:
    from torch.nn.attention.flex_attention import flex_attention

    fused = torch.compile(flex_attention, dynamic=False)
    packed = torch.randn(IMAGES, length, 3, HEADS, WIDTH // HEADS, device=host.device, dtype=torch.bfloat16)
    packed.requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    gradient = torch.randn_like(q)
    seconds = timed(lambda: torch.autograd.grad(fused(q, k, v), packed, gradient), host.device)
    return {"flex_ms": 1000 * seconds} | _rate(IMAGES, length, seconds)


def _rate(images: int, length: int, seconds: float) -> Facts:
    return {"teraflops": 3.5 * 4.0 * images * length * length * WIDTH / seconds / 1e12}
