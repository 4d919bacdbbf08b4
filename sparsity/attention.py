"""Attention of one block: from its input to its residual, with the queries, keys and values for the mechanisms.

`fused` is timm's own attention (scaled_dot_product_attention, or timm's plain form where its `fused_attn` is off), bit for bit
if nothing is left out. `authors` is the softmax with an epsilon of the Tri-Level reference code, for `compat: authors` only.

Letters as in `types`; S keys that are visible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity.attention_kernel import TORCHS_CHOICE, Kernels, using
from sparsity.types import QKV, Tokens

Attend = Callable[[Any, Tensor, Tokens, Kernels], tuple[Tensor, QKV]]
"""(timm Attention, normed x (B, T, D), the tokens it belongs to, kernels) -> (B, T, D) before LayerScale, and its QKV."""

EPS = 1e-6  # of the authors' softmax


def fused(attention: Any, x: Tensor, tokens: Tokens, kernels: Kernels = TORCHS_CHOICE) -> tuple[Tensor, QKV]:
    """timm's attention over the visible keys. `tokens.size` weights a key by its number of patches (ToMe, eq. 1)."""
    qkv = project_qkv(attention, x)
    k, v, bias = visible(qkv, tokens)
    if attention.fused_attn:
        dropped = attention.attn_drop.p if attention.training else 0.0
        with using(kernels.get((x.shape[1], bias is not None))):  # no layer inside: DDP may split a compiled graph at layers
            out = F.scaled_dot_product_attention(qkv.q, k, v, attn_mask=bias, dropout_p=dropped)
    else:
        scores = (qkv.q * attention.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
        out = attention.attn_drop(scores.softmax(dim=-1)) @ v
    return project(attention, out, x), qkv


def authors(attention: Any, x: Tensor, tokens: Tokens, _: Kernels = TORCHS_CHOICE) -> tuple[Tensor, QKV]:
    """(A + eps/T) / (sum A + eps) with A = exp(S - max S) * mask, the max over hidden keys too (Tri-Level's code;
    docs/methods.md, section Compat).

    Stores the head mean of the map in `QKV.attention`, the input of their selections, including ties at eps/T.
    """
    qkv = project_qkv(attention, x)
    scores = (qkv.q @ qkv.k.transpose(-2, -1)) * attention.scale  # (B, H, T, T)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).float().exp()
    if tokens.keys is not None and tokens.keys.mask is not None:
        weights = weights * tokens.keys.mask
    weights = (weights + EPS / x.shape[1]) / (weights.sum(dim=-1, keepdim=True) + EPS)
    weights = attention.attn_drop(weights)
    out = project(attention, weights.to(qkv.v.dtype) @ qkv.v, x)
    return out, qkv._replace(attention=weights.sum(dim=1) / weights.shape[1])


def project_qkv(attention: Any, x: Tensor) -> QKV:
    """Queries, keys and values of a timm Attention: x (B, T, D) -> each (B, H, T, d)."""
    batch, length, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, length, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return QKV(attention.q_norm(q), attention.k_norm(k), v, attention.scale)


def visible(qkv: QKV, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """Visible keys and values, (B, H, S, d), and the mask for SDPA: bool, float32 bias, or None if all are visible."""
    k, v, size, mask = qkv.k, qkv.v, tokens.size, None
    if tokens.keys is not None:
        mask = tokens.keys.mask
        if tokens.keys.index is not None:
            k, v = gather_tokens(k, tokens.keys.index, 2), gather_tokens(v, tokens.keys.index, 2)
            size = None if size is None else size.gather(1, tokens.keys.index)
    if size is None:
        return k, v, mask
    bias = size.log()[:, None, None, :].to(qkv.q.dtype)  # (B, 1, 1, S)
    return k, v, bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def project(attention: Any, out: Tensor, x: Tensor) -> Tensor:
    """Concatenate the heads and project: (B, H, T, d) -> (B, T, D)."""
    batch, length, _ = x.shape
    out = attention.norm(out.transpose(1, 2).reshape(batch, length, attention.num_heads * attention.head_dim))
    gate = getattr(attention, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


def gather_tokens(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries `index` (B, K) of dimension `dim` of (B, ..., T, ...), for each image its own. For a gradient they are distinct."""
    in_graph = torch.compiler.is_compiling() and index.shape[1] > 0
    return _gathered_in_graph(tensor, index, dim) if in_graph else _gathered(tensor, index, dim)


def _gathered(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    expanded = [-1 if d in (0, dim) else tensor.shape[d] for d in range(tensor.ndim)]
    return tensor.gather(dim, _along(index, dim, tensor.ndim).expand(expanded))


def _along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """(B, K) with K as dimension `dim` of `ndim`."""
    shape = [1] * ndim
    shape[0], shape[dim] = values.shape
    return values.view(shape)


class _Gathered(torch.autograd.Function):
    """`_gathered`, with `spread_back` as its gradient. torch's own writes zeros and adds to them by atomics, which torch.compile fuses with
    nothing: two more passes over the tokens."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.length = dim, tensor.shape[dim]
        return _gathered(tensor, index, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (index,) = gradients, ctx.saved_tensors
        return spread_back(gradient, index, ctx.dim, ctx.length), None, None


def spread_back(gradient: Tensor, index: Tensor, dim: int, length: int) -> Tensor:
    """The gradient of `gather_tokens`, `index` distinct: each of the `length` entries reads its own, or is 0. To the bit torch's."""
    rows, kept = index.shape
    numbers = torch.arange(kept, device=index.device).expand(rows, -1)
    place = index.new_full((rows, length), kept).scatter(1, index, numbers)  # kept: the entry was dropped
    found = _gathered(gradient, place.clamp(max=kept - 1), dim)
    return torch.where(_along(place < kept, dim, gradient.ndim), found, 0.0)


@torch.compiler.allow_in_graph  # else dynamo makes a higher-order operation of it, with its own graph inside
def _gathered_in_graph(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    return _Gathered.apply(tensor, index, dim)  # pyright: ignore[reportReturnType]
