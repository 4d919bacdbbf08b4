"""What differs between a block of timm's SwinTransformer and one of SwinTransformerV2 (Liu et al., arXiv 2111.09883): the place of the
norms, the product of queries and keys, and the position bias. Letters as in `windows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor

FORMS = {
    SwinTransformer: (SwinTransformerBlock, WindowAttention),
    SwinTransformerV2: (SwinTransformerV2Block, WindowAttentionV2),
}
"""Network -> its block and attention."""

LARGEST = math.log(1.0 / 0.01)  # of the logarithm of a head's factor, equation 2
Part = Callable[[Tensor], Tensor]


def parts_of(block: Any) -> tuple[Part, Part, Part, Part]:
    """The modules before and after attention and MLP: norm and identity, or identity and norm (V2)."""
    if isinstance(block, SwinTransformerV2Block):
        return _same, block.norm1, _same, block.norm2
    return block.norm1, _same, block.norm2, _same


def qkv_bias(attention: Any) -> Tensor | None:
    """What is added to queries, keys and values, (3 H d); None without."""
    if not isinstance(attention, WindowAttentionV2):
        return attention.qkv.bias
    parts: list[Any] = [attention.q_bias, attention.k_bias, attention.v_bias]
    return None if parts[0] is None else torch.cat(parts)


def project(attention: Any, x: Tensor) -> Tensor:
    """x (B, k, D) -> queries, keys and values (B, k, 3 H d)."""
    qkv = attention.qkv(x)  # a call of the module, whose weight ZeRO 3 gathers then
    if not isinstance(attention, WindowAttentionV2) or (bias := qkv_bias(attention)) is None:
        return qkv
    return qkv + bias.to(qkv.dtype)


def compared(attention: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
    """Queries and keys (..., H, N, d), and a factor of their products. V2 takes the cosine, times a learned factor of each head."""
    if not isinstance(attention, WindowAttentionV2):
        return q, k, attention.scale
    factor = attention.logit_scale.clamp(max=LARGEST).exp()
    return (F.normalize(q, dim=-1) * factor).to(q.dtype), F.normalize(k, dim=-1).to(k.dtype), 1.0


def position_bias(block: Any) -> Tensor:
    """What is added to the products for the relative position of query and key, (1, H, N, N)."""
    attention, area = block.attn, block.window_area
    if not isinstance(block, SwinTransformerV2Block):
        return attention._get_rel_pos_bias()
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads)
    return 16 * torch.sigmoid(table[attention.relative_position_index.view(-1)].view(1, area, area, -1).permute(0, 3, 1, 2))


def _same(x: Tensor) -> Tensor:
    return x
