"""Multiply-adds of a timm SwinTransformer or SwinTransformerV2 whose stage keeps some of its tokens, counted from shapes as in `cost`. The
position bias of V2, computed once for a batch, is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import nn

from sparsity.network import Cost
from sparsity.swin.windows import num_windows


def cost(swin: Any, kept: Mapping[int, int], in_mlp: Mapping[int, int]) -> Cost:
    """kept: tokens in the attention of a block, by its number over all stages; the others are computed in timm's form. in_mlp: in its
    MLP, as many as in its attention if absent. Scores come from the products of the attention itself."""
    convolution = swin.patch_embed.proj
    height, width = swin.patch_embed.grid_size
    inputs = convolution.in_channels // convolution.groups * prod(convolution.kernel_size)
    total, per_block, tokens, number = height * width * inputs * convolution.out_channels, [], [], 0
    for stage in swin.layers:
        height, width = stage.output_resolution
        if not isinstance(stage.downsample, nn.Identity):
            total += height * width * _linear(stage.downsample)
        for block in stage.blocks:
            whole = height * width
            number_kept = kept.get(number, whole)
            area, windows = block.window_area, num_windows(block)
            products = windows * area * area * block.attn.proj.in_features
            in_attention = number_kept if number in kept else windows * area  # timm's form computes the padding of windows too
            work = in_attention * (_linear(block.attn.qkv) + _linear(block.attn.proj)) + 2 * products
            work += in_mlp.get(number, number_kept) * _linear(block.mlp)
            per_block.append(work)
            tokens.append(number_kept)
            number += 1
    total += sum(per_block) + _linear(swin.head)
    return Cost(total, tuple(per_block), tuple(tokens), height * width)


def _linear(module: nn.Module) -> int:
    """Multiply-adds of all linear layers of a module for one token."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
