"""Which of torch's attention kernels a run uses: the fastest for each of its token counts, measured at the start on a GPU.

On Hopper cuDNN's kernel is public knowledge to be about twice as fast as flash-attention 2 at training shapes, and slower at some others,
so each count is timed, with a mask where the network has one. Where the chosen kernel does not take an input, torch uses the next one.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparsity.attention_kernel import BACKENDS, AttentionShape, Kernels

WARM_UP, TIMES, CALLS = 2, 5, 8  # rounds of several calls: one alone takes as long as its launches where tokens are few
MOST = 16  # token counts that are timed, with and without a mask each; cuDNN prepares each for about a second. The others take the nearest
Times = dict[AttentionShape, dict[str, float]]


def measured(device: torch.device, images: int, shapes: Iterable[AttentionShape], kind: torch.dtype) -> Times:
    """Milliseconds of the forward and backward pass of one attention over `images` images, by shape and backend, without those that do not
    take it. The global random generator is left as it is."""
    found: Times = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns why a backend does not take the input
        for shape in _few(shapes):
            found[shape] = {}
            for name in ("flash", "cudnn", "efficient") if device.type == "cuda" else ("flash", "math"):
                with contextlib.suppress(RuntimeError):
                    found[shape][name] = _milliseconds(device, images, shape, kind, name)
    return {shape: times for shape, times in found.items() if times}


def fastest(times: Times, shapes: Iterable[AttentionShape]) -> Kernels:
    """For each of the shapes the backend that was fastest at the nearest timed count, with a mask or without as it is."""
    found: dict[tuple[int, bool], str] = {}
    for shape in shapes:
        alike = [timed for timed in times if timed.masked == shape.masked]
        if alike:
            nearest = times[min(alike, key=lambda timed: abs(timed.tokens - shape.tokens))]
            found[shape.kind] = min(nearest, key=lambda name: nearest[name])
    return found


def facts(times: Times, kernels: Kernels) -> dict[str, Any]:
    """For the journal: `attention` {tokens: backend}, or the one of all; `attention_ms` {tokens: {backend: ms}}."""
    by_name = {_named(*kind): name for kind, name in sorted(kernels.items())}
    same = set(by_name.values())
    return {
        "attention": same.pop() if len(same) == 1 else by_name,
        "attention_ms": {_named(*shape.kind): times[shape] for shape in sorted(times)},
    }


def kept(before: Kernels, on: str, device: str) -> tuple[Kernels, list[str]]:
    """Of the kernels that an attempt timed `on` a device (empty: unknown) those that a resume on `device` uses again: all or none; and what
    it reports then."""
    if not before or on in ("", device):
        return before, []
    named = ", ".join(f"{_named(*kind)}: {name}" for kind, name in sorted(before.items()))
    return {}, [
        f"attention kernels are timed anew on {device}: those of the checkpoint were the fastest on {on} ({named}). "
        "engine.attention=NAME fixes one on every device"
    ]


def _named(tokens: int, masked: bool) -> str:
    return f"{tokens} masked" if masked else str(tokens)


def _few(shapes: Iterable[AttentionShape]) -> list[AttentionShape]:
    """At most MOST with a mask and MOST without, from the fewest tokens to the most."""
    kinds: Mapping[tuple[int, bool], AttentionShape] = {shape.kind: shape for shape in shapes}
    found = []
    for masked in (False, True):
        one = [kinds[kind] for kind in sorted(kinds) if kind[1] == masked]
        many = min(MOST, len(one))
        found += [one[round(at * (len(one) - 1) / max(many - 1, 1))] for at in range(many)]
    return found


def _milliseconds(device: torch.device, images: int, shape: AttentionShape, kind: torch.dtype, name: str) -> float:
    generator = torch.Generator(device).manual_seed(0)
    heads, tokens, width = shape[:3]
    packed = torch.randn(images, tokens, 3, heads, width, generator=generator, device=device).to(kind).requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # as timm's projection gives them
    mask = _mask(shape, images, generator, kind)
    gradient = torch.randn(q.shape, generator=generator, device=device).to(kind)

    def one() -> None:
        with sdpa_kernel(BACKENDS[name]):
            torch.autograd.grad(scaled_dot_product_attention(q, k, v, attn_mask=mask), packed, gradient)

    calls = CALLS if device.type == "cuda" else 1
    best = float("inf")
    for turn in range(WARM_UP + TIMES):
        started = time.perf_counter()
        for _ in range(calls):
            one()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = best if turn < WARM_UP else min(best, time.perf_counter() - started)
    return 1000 * best / calls


def _mask(shape: AttentionShape, images: int, generator: torch.Generator, kind: torch.dtype) -> Tensor | None:
    """In the form that the network gives to its attention (`sparsity.attention.visible`): kernels differ in what they take."""
    device, tokens, bias = generator.device, shape.tokens, None
    if shape.weighs:  # logarithms of the patches that a token stands for
        bias = torch.randint(1, 5, (images, 1, 1, tokens), generator=generator, device=device).log().to(kind)
    if not shape.hides:
        return bias
    kept = torch.rand(images, 1, tokens, tokens, generator=generator, device=device) < 0.5
    kept |= torch.eye(tokens, dtype=torch.bool, device=device)
    return kept if bias is None else bias.masked_fill(~kept, float("-inf"))
