"""Token selection of a Swin stage as the Tri-Level reference code computes it (`compat: authors`): hidden tokens are computed all the same,
so nothing is saved. docs/methods.md, section Swin, names what differs from ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor

from sparsity.attention import EPS

Drop = Callable[[Any, Tensor, int], Tensor]
"""(drop path, branch (B, ...), 0 for attention or 1 for the MLP) -> the branch, with some images' set to 0."""


class Step(NamedTuple):
    """x: (B, H, W, D) after the block. score: (B, L) attention that each token receives from its window, hidden queries included."""

    x: Tensor
    score: Tensor


def block(block: Any, x: Tensor, visible: Tensor, drop: Drop) -> Step:
    """One block on x (B, H, W, D) with the tokens `visible` (B, L) bool: the input of a hidden one is 0, its key is off for all but itself,
    and its old value stands again afterwards."""
    batch, height, width, depth = x.shape
    shown = visible.view(batch, height, width, 1)
    given = x * shown
    attended, score = _attend(block, block.norm1(given), visible)
    given = given + drop(block.drop_path1, attended, 0)
    given = given + drop(block.drop_path2, block.mlp(block.norm2(given).view(batch, -1, depth)).view(x.shape), 1)
    return Step(torch.where(shown, given, x), score)


def visible_after(score: Tensor, visible: Tensor, number: int) -> Tensor:
    """The tokens whose score is above that of the `number`-th best visible one, (B, L) bool: one fewer than `number`; a hidden one may come
    back."""
    return score > (score * visible).topk(number, dim=1).values[:, -1:]


def _attend(block: Any, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, H, W, D) with (A + eps/N) / (sum A + eps), A = exp(S - max S) * (visible or itself); and the score."""
    attention, (batch, height, width, depth) = block.attn, x.shape
    shift, size, area = block.shift_size, block.window_size, block.attn.window_area
    windows = window_partition(torch.roll(x, (-shift[0], -shift[1]), (1, 2)), size).view(-1, area, depth)
    shown = torch.roll(visible.view(batch, height, width, 1).float(), (-shift[0], -shift[1]), (1, 2))
    shown = window_partition(shown, size).view(-1, 1, 1, area)
    qkv = attention.qkv(windows).view(-1, area, 3, attention.num_heads, depth // attention.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    products = (q * attention.scale) @ k.transpose(-2, -1) + attention._get_rel_pos_bias()
    if block.attn_mask is not None:
        mask = block.attn_mask[None, :, None]
        products = (products.view(batch, -1, *products.shape[1:]) + mask).view_as(products)
    itself = torch.eye(area, device=x.device)
    weights = (products - products.amax(dim=-1, keepdim=True)).float().exp() * (shown + (1 - shown) * itself)
    weights = (weights + EPS / area) / (weights.sum(dim=-1, keepdim=True) + EPS)
    out = (attention.attn_drop(weights).to(v.dtype) @ v).transpose(1, 2).reshape(-1, area, depth)
    out = attention.proj_drop(attention.proj(out)).view(-1, *size, depth)
    score = weights.detach().mean(dim=1).sum(dim=1).view(-1, *size, 1)
    back = [torch.roll(window_reverse(part, size, height, width), shift, (1, 2)) for part in (out, score)]
    return back[0], back[1].view(batch, -1)
