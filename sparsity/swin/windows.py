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

from sparsity.swin import forms


class Attended(NamedTuple):
    """out: (B, k, D) after the projection. received: (B, k) float32, the attention that each kept token receives: mean over heads, summed
    over the kept queries of its window (docs/methods.md, section Swin); None if it was not asked for."""

    out: Tensor
    received: Tensor | None


HIDDEN = -1e30
"""Added to the products of a key that is not there: its weight is 0, and a row without any key stays finite, which -inf would not."""


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


def attend(block: Any, x: Tensor, slots: Tensor, scored: bool = False) -> Attended:
    """Attention of the tokens x (B, k, D), which lie in `slots` (B, k) int64: each over the kept tokens of its window. scored: for
    `received`; the products are those of the attention itself, in float32.

    Padding has the key and value of a zero, as in timm.
    """
    attention, batch = block.attn, x.shape[0]
    area, heads, windows = block.window_area, attention.num_heads, num_windows(block)
    qkv = forms.project(attention, x)
    rows = _rows(slots, windows * area)
    spread = _padding(block, qkv, windows * area).flatten(0, 1).index_put((rows,), qkv.flatten(0, 1))
    q, k, v = spread.view(-1, area, 3, heads, qkv.shape[2] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k, scale = forms.compared(attention, q, k)
    added = _added(block, slots, windows * area)
    dropped = attention.attn_drop.p if attention.training else 0.0
    received = None
    if getattr(attention, "fused_attn", False) and not scored:  # SwinTransformerV2 has no fused form
        mask = added.flatten(0, 1).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped, scale=scale)
    else:
        weights = (_products(q, k, scale, scored).unflatten(0, (-1, windows)) + added).softmax(dim=-1).flatten(0, 1)
        received = _received(weights, slots, rows) if scored else None
        out = F.dropout(weights, dropped).to(v.dtype) @ v
    out = out.transpose(1, 2).reshape(batch * windows * area, -1).index_select(0, rows).view(batch, slots.shape[1], -1)
    return Attended(attention.proj_drop(attention.proj(out)), received)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` (B, k) of x (B, L, D), for each image its own. Whole rows are copied: several times faster than `gather` on CPUs."""
    return x.flatten(0, 1).index_select(0, _rows(index, x.shape[1])).view(*index.shape, x.shape[2])


def put(x: Tensor, index: Tensor) -> Tensor:
    """The tokens x (B, L, D) at the places `index` (B, L), each place once: the reverse of `take`."""
    return torch.empty_like(x).flatten(0, 1).index_put((_rows(index, x.shape[1]),), x.flatten(0, 1)).view_as(x)


def _rows(index: Tensor, number: int) -> Tensor:
    """Places `index` (B, k) of each image among the rows of all images, `number` each: (B * k,)."""
    return (index + number * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


def _products(q: Tensor, k: Tensor, scale: float, scored: bool) -> Tensor:
    """q K^T (B * windows, H, N, N); for scores in float32, also under autocast."""
    if not scored:
        return (q * scale) @ k.transpose(-2, -1)
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * scale) @ k.float().transpose(-2, -1)


@torch.no_grad()
def _received(weights: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """See `Attended`; weights (B * windows, H, N, N)."""
    batch, area = slots.shape[0], weights.shape[2]
    queries = weights.new_zeros(batch, weights.shape[0] // batch * area).scatter(1, slots, 1.0).view(-1, 1, area)
    with torch.autocast(weights.device.type, enabled=False):
        return (queries @ weights.float().mean(dim=1)).flatten().index_select(0, rows).view(slots.shape)


def _added(block: Any, slots: Tensor, size: int) -> Tensor:
    """What is added to the products: relative position bias, the mask of shifted windows, and `HIDDEN` for keys of slots without a kept
    token that are not padding: (B, windows, H, N, N)."""
    bias = forms.position_bias(block)  # (1, H, N, N)
    if block.attn_mask is not None:
        bias = bias + block.attn_mask[:, None]
    keys = torch.full((slots.shape[0], size), HIDDEN, device=slots.device).scatter(
        1, slots, 0.0
    )  # index_fill fails in inductor
    if not _divides(block):
        keys = keys * ~_is_padding(block, size, slots.device)
    return bias + keys.view(-1, num_windows(block), 1, 1, block.window_area)


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
