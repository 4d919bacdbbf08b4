"""Scores of tokens: from the attention inputs of a block to one float32 number per token.

Computed in float32 outside autocast: in bf16 about a quarter of the rows of 196 tokens has a tie at the cut. A score uses every key,
also those that level 3 hides from the block: a hidden token may be selected again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsity import keyed_random
from sparsity.tokens import scores
from sparsity.types import QKV, BlockShape, Plan, Tokens, num_kept

Score = Callable[[Tokens, QKV], Tensor]
"""(tokens, qkv) -> (B, T - p) float32; the largest are kept."""

SALT = 0x72616E6B  # salt of the random order


def cls_row(tokens: Tokens, qkv: QKV) -> Tensor:
    """Attention of the [CLS] query over patches, mean over heads; the [CLS] key counts in the softmax, not in the result (docs/methods.md,
    section Tokens)."""
    if qkv.attention is not None:
        return qkv.attention[:, 0, tokens.num_prefix :].float()
    return attention_rows(tokens, qkv, 1).mean(dim=(1, 2))[:, tokens.num_prefix :]


def prefix_rows(tokens: Tokens, qkv: QKV) -> Tensor:
    """Attention of all prefix tokens over patches, mean over them and over heads: `cls_row` where [CLS] is the only one."""
    return attention_rows(tokens, qkv, tokens.num_prefix).mean(dim=(1, 2))[:, tokens.num_prefix :]


def value_norm(tokens: Tokens, qkv: QKV) -> Tensor:
    """`prefix_rows` (`received` without prefix tokens) times the length of the patch's value over all heads."""
    row = prefix_rows(tokens, qkv) if tokens.num_prefix else received(tokens, qkv)
    return row * qkv.v[:, :, tokens.num_prefix :].float().square().sum(dim=(1, 3)).sqrt()


def received(tokens: Tokens, qkv: QKV) -> Tensor:
    """Attention a patch receives, mean over all queries and heads: for models without [CLS]."""
    return attention_rows(tokens, qkv, None).mean(dim=(1, 2))[:, tokens.num_prefix :]


def random(tokens: Tokens, qkv: QKV) -> Tensor:
    """A random order of the patches, keyed by (image, patch id); one fixed order for all images if `tokens.rng_keys` is None."""
    keys = tokens.ids if tokens.rng_keys is None else keyed_random.combine(tokens.rng_keys[:, None], tokens.ids)
    return keyed_random.uniform(keys, SALT)


NUM_QUERIES: dict[Score, Callable[[BlockShape], int]] = {
    cls_row: lambda shape: 1,
    prefix_rows: lambda shape: shape.num_prefix,
    value_norm: lambda shape: shape.num_prefix or shape.num_patches,
    received: lambda shape: shape.num_prefix + shape.num_patches,
    random: lambda shape: 0,
}
"""The number of rows of the attention map that a score computes."""

BY_NAME: dict[str, Score] = {"cls": cls_row, "prefix": prefix_rows, "received": received, "value_norm": value_norm}
"""Scores that a user chooses by name."""


def importance(tokens: Tokens, qkv: QKV, name: str) -> Tensor:
    """A score by name, renormalised: rows sum to 1 (token importance of SaiT, arXiv 2210.05832)."""
    row = BY_NAME[name](tokens, qkv)
    return row / row.sum(dim=1, keepdim=True)


def attention_rows(tokens: Tokens, qkv: QKV, num_queries: int | None) -> Tensor:
    """Softmaxed attention of the first `num_queries` queries (None: all) over all T keys: (B, H, queries, T) float32."""
    with torch.autocast(qkv.q.device.type, enabled=False):
        q = qkv.q[:, :, :num_queries].float()
        logits = _products(q, qkv.k.float()) * qkv.scale
        if tokens.size is not None:
            logits = logits + tokens.size.log()[:, None, None, :]
        return logits.softmax(dim=-1)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q k^T: (B, H, queries, d), (B, H, T, d) -> (B, H, queries, T)."""
    if (
        torch.compiler.is_compiling() and q.shape[2] == 1
    ):  # one kernel that reads k as it is; a product would need k stored in float32
        return (q * k).sum(dim=-1)[:, :, None]
    return q @ k.transpose(-2, -1)


def ranked(scores: Tensor) -> Tensor:
    """Positions from the largest score to the smallest in the last dimension, ties by position (lowest first)."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def work(shape: BlockShape, plan: Plan, num_queries: int) -> int:
    """q K^T of `num_queries` rows; 0 if no key is hidden."""
    if num_kept(shape.num_patches, plan.keep_connections) == shape.num_patches:
        return 0
    return num_queries * (shape.num_prefix + shape.num_patches) * shape.heads * shape.head_width


def among_patches(tokens: Tokens, qkv: QKV) -> Tensor:
    """P: softmax over the remaining tokens, mean over heads, patch rows and columns: (B, k, k) float32."""
    p = tokens.num_prefix
    whole = scores.attention_rows(tokens, qkv, None).mean(dim=1) if qkv.attention is None else qkv.attention
    return whole[:, p:, p:]
