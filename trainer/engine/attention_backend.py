"""Which of torch's attention kernels a run uses: the fastest at its token counts, measured at the start on a GPU.

On Hopper cuDNN's kernel is public knowledge to be about twice as fast as flash-attention 2 at training shapes, and slower at some others,
so it is timed. Where the chosen kernel does not take an input (a mask, another type), torch uses the next one.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
WARM_UP, TIMES = 2, 5
Shape = tuple[int, int, int]


def using(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Inside the context torch's attention uses this backend where it can, else the others in the order of BACKENDS. None: torch's choice.
    A graph that torch.compile makes inside keeps it."""
    if name is None:
        return contextlib.nullcontext()
    return sdpa_kernel([BACKENDS[name], *(backend for other, backend in BACKENDS.items() if other != name)], set_priority=True)


def measured(device: torch.device, images: int, shapes: Iterable[Shape], kind: torch.dtype) -> dict[str, float]:
    """{backend: ms of the forward and backward passes of all these attentions}, (heads, tokens, head width) each, for `images` images;
    without those that do not take them. The global random generator is left as it is."""
    counts, found = Counter(shapes), {}
    for name in ("flash", "cudnn", "efficient") if device.type == "cuda" else ("flash", "math"):
        with contextlib.suppress(RuntimeError):
            found[name] = sum(count * _milliseconds(device, images, shape, kind, name) for shape, count in counts.items())
    return found


def _milliseconds(device: torch.device, images: int, shape: Shape, kind: torch.dtype, name: str) -> float:
    heads, tokens, width = shape
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(images, tokens, 3, heads, width, generator=generator, device=device).to(kind).requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # as timm's projection gives them

    def one() -> None:
        with sdpa_kernel(BACKENDS[name]):
            torch.autograd.grad(scaled_dot_product_attention(q, k, v).sum(), packed)

    best = float("inf")
    for turn in range(WARM_UP + TIMES):
        started = time.perf_counter()
        one()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = best if turn < WARM_UP else min(best, time.perf_counter() - started)
    return 1000 * best
