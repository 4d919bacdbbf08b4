"""Multiply-adds counted from the operations of a forward pass, for networks of any form (torch's FlopCounterMode). Nothing is computed:
the pass runs on fake tensors, which have shapes and no values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def traced(network: nn.Module, height: int, width: int, channels: int = 3, images: int = 1) -> tuple[int, Any]:
    """Multiply-adds of one of `images` images of this size, in the mode that the network is in, and what the pass returned.

    Matrix products and convolutions are counted, as in `cost`. Attention is traced as the two products that it is: the counter does not
    know all fused kernels (torch 2.13: not that of CPUs). Raises what the network raises, e.g. for an image of another size.
    """
    first = next((value for value in network.parameters() if value.is_floating_point()), torch.empty(0))
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode, sdpa_kernel(SDPBackend.MATH):
        state: dict[str, Tensor] = {
            name: mode.from_tensor(value.detach()) for name, value in (*network.named_parameters(), *network.named_buffers())
        }
        pixels = torch.empty(images, channels, height, width, device=first.device, dtype=first.dtype)
        counter = FlopCounterMode(display=False)
        with counter:
            # by one name each: where blocks share a module, torch 2.15 would put fake weights back under the other name
            output = functional_call(network, state, (pixels,), tie_weights=False)
    return counter.get_total_flops() // (2 * images), output


def embed_work(embed: Any) -> int:
    """Multiply-adds of a patch embedding, of a hybrid network too. Call it once: under ZeRO 3 its weights are partitioned later."""
    convolution, height, width = getattr(embed, "proj", None), *embed.img_size
    if not isinstance(convolution, nn.Conv2d) or sum(isinstance(m, nn.Conv2d) for m in embed.modules()) != 1:
        return traced(embed, height, width, getattr(embed, "in_chans", 3))[0]
    inputs = convolution.in_channels // convolution.groups * prod(convolution.kernel_size)
    return embed.num_patches * inputs * convolution.out_channels


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of a failed operation, 40 lines on standard error: the exception has what it says."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def shape_of_logits(output: Any) -> tuple[int, ...]:
    """() for what is not one tensor of logits."""
    return tuple(output.shape) if isinstance(output, Tensor) else ()
