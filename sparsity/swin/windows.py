"""Attention in the windows of a Swin block over the tokens that an image keeps: norm, qkv, projection and MLP run on these alone, and their
queries, keys and values are scattered into the windows.

Letters as in `types`; L tokens of the grid, k of them kept, S = windows * N slots: the places in all windows of an image, N per window.
A slot has a token of the grid, or padding where windows do not divide the grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity.attention import gather_tokens
from sparsity.swin import forms


class Attended(NamedTuple):
    """out: (B, k, D) after the projection. q, k: (B * windows, H, N, d). scale: of their products. mask: (B * windows, H, N, N) added to
    them; -inf for keys that are not there. there: (B, S) bool, the slots with a kept token."""

    out: Tensor
    q: Tensor
    k: Tensor
    scale: float
    mask: Tensor
    there: Tensor


def places(block: Any, device: torch.device) -> Tensor:
    """The slot of each token of the grid, (L,) int64: after the block's cyclic shift and padding, window by window."""
    (height, width), (high, wide), (down, right) = block.input_resolution, block.window_size, block.shift_size
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)[None]
    rows, columns = (rows - down) % height, (columns - right) % width
    window = rows // high * -(-width // wide) + columns // wide
    return (window * (high * wide) + rows % high * wide + columns % wide).flatten()


def num_windows(block: Any) -> int:
    (height, width), (high, wide) = block.input_resolution, block.window_size
    return -(-height // high) * -(-width // wide)


def attend(block: Any, x: Tensor, slots: Tensor) -> Attended:
    """Attention of the tokens x (B, k, D), which lie in `slots` (B, k) int64: each over the kept tokens of its window.

    Padding has the key and value of a zero, as in timm. An empty slot sees itself, so that no row of the softmax is empty.
    """
    attention, batch = block.attn, x.shape[0]
    area, heads = block.window_area, attention.num_heads
    size = num_windows(block) * area
    qkv = forms.project(attention, x)
    spread = _padding(block, qkv, size).scatter(1, slots[..., None].expand(-1, -1, qkv.shape[2]), qkv)
    there = torch.zeros(batch, size, dtype=torch.bool, device=x.device).scatter(1, slots, True)
    q, k, v = spread.view(-1, area, 3, heads, qkv.shape[2] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k, scale = forms.compared(attention, q, k)
    mask = _mask(block, there if _divides(block) else there | _is_padding(block, size, x.device)).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=attention.attn_drop.p if attention.training else 0.0, scale=scale
    )
    out = gather_tokens(out.transpose(1, 2).reshape(batch, size, -1), slots, 1)
    return Attended(attention.proj_drop(attention.proj(out)), q, k, scale, mask, there)


@torch.no_grad()
def received(block: Any, attended: Attended, slots: Tensor) -> Tensor:
    """Attention that each kept token receives: mean over heads, summed over the kept queries of its window, (B, k) float32
    (docs/methods.md, section Swin)."""
    with torch.autocast(attended.q.device.type, enabled=False):
        products = attended.q.float() @ attended.k.float().transpose(-2, -1) * attended.scale
        weights = (products + attended.mask.float()).softmax(dim=-1).mean(dim=1)  # (B * windows, N, N)
        queries = attended.there.view(-1, 1, weights.shape[1]).float()
        return (queries @ weights).view(attended.there.shape).gather(1, slots)


def _mask(block: Any, seen: Tensor) -> Tensor:
    """What is added to the products: relative position bias, the mask of shifted windows, and -inf for keys of slots that are not `seen`
    (B, S), except for their own query: (B * windows, H, N, N)."""
    area, windows = block.window_area, num_windows(block)
    bias = forms.position_bias(block)[:, None]  # (1, 1, H, N, N)
    if block.attn_mask is not None:
        bias = bias + block.attn_mask[None, :, None]
    allowed = seen.view(-1, windows, 1, 1, area) | torch.eye(area, dtype=torch.bool, device=seen.device)
    return torch.where(allowed, bias, float("-inf")).flatten(0, 1)


def _divides(block: Any) -> bool:
    """Whether windows divide the grid, so that there is no padding."""
    return all(side % window == 0 for side, window in zip(block.input_resolution, block.window_size, strict=True))


def _is_padding(block: Any, size: int, device: torch.device) -> Tensor:
    """The slots without a token of the grid, (S,) bool."""
    return torch.ones(size, dtype=torch.bool, device=device).scatter(0, places(block, device), False)


def _padding(block: Any, qkv: Tensor, size: int) -> Tensor:
    """What is in the slots before the tokens are scattered into them, (B, S, 3 H d): 0, and the qkv of a zero in the padding."""
    empty = qkv.new_zeros(qkv.shape[0], size, qkv.shape[2])
    bias = forms.qkv_bias(block.attn)
    if bias is None or _divides(block):
        return empty
    return empty + _is_padding(block, size, qkv.device)[:, None] * bias.to(qkv.dtype)
