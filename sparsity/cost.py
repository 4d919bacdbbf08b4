"""Multiply-adds of one image's forward pass under a plan, counted from shapes alone, so the saving of a plan is known before a run.

Matrix products and convolutions are counted, including those that select tokens and keys; norms, softmax, gathers and sums are
not, as in the papers' GMACs. Patch drop (timm's patch_drop_rate, training only) is not subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol, cast

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparsity.network import Cost
from sparsity.types import DENSE, BlockShape, Connect, Plan, Reduce


@dataclass(frozen=True)
class BlockWork:
    """attention: multiply-adds per token of qkv, gate and projection. mlp: per token. heads, head_width: of the attention."""

    attention: int
    mlp: int
    heads: int
    head_width: int


@dataclass(frozen=True)
class Shape:
    """The numbers that determine the cost of a network. embed: of the patch embedding; head: per image; pool: per pooled token;
    pool_pairs: per pair of pooled tokens; pools_prefix: whether prefix tokens are pooled."""

    num_prefix: int
    num_patches: int
    width: int
    embed: int
    head: int
    pool: int
    pool_pairs: int
    pools_prefix: bool
    blocks: tuple[BlockWork, ...]
    selects: frozenset[int]
    position: str
    reduce: Reduce
    connect: Connect


class Selecting(Protocol):
    """What `SparseViT` has, as far as its cost depends on it. embed_work: multiply-adds of its patch embedding."""

    embed_work: int
    blocks: frozenset[int]
    position: str
    reduce: Reduce
    connect: Connect

    @property
    def vit(self) -> VisionTransformer: ...


def shape_of(model: Selecting, left: Mapping[str, float] = MappingProxyType({})) -> Shape:
    """The shape of a model, at its own image size. Raises ValueError for a pooling whose multiply-adds are not counted.

    left: shares of pruned layers that are computed, see `Pruning.shares`: of the weight by name of a linear layer, of the heads by name of
    an attention.
    """
    vit: Any = model.vit
    refuse(vit)
    num_patches = vit.patch_embed.num_patches
    heads = [getattr(vit, name) for name in ("head", "head_dist") if isinstance(getattr(vit, name, None), nn.Linear)]
    per_token, pairs, per_image = _pooling(vit.attn_pool)
    blocks: list[Any] = list(vit.blocks)
    return Shape(
        num_prefix=vit.num_prefix_tokens,
        num_patches=num_patches,
        width=vit.embed_dim,
        embed=model.embed_work,
        head=per_image + sum(_linear(head) for head in heads),
        pool=per_token,
        pool_pairs=pairs,
        pools_prefix=vit.pool_include_prefix,
        blocks=tuple(_block(b, f"blocks.{number}", left) for number, b in enumerate(blocks)),
        selects=model.blocks,
        position=model.position,
        reduce=model.reduce,
        connect=model.connect,
    )


def refuse(vit: Any) -> None:
    """Raises ValueError, naming the part, for a VisionTransformer whose multiply-adds are not counted here."""
    _pooling(vit.attn_pool)


def cost(shape: Shape, plan: Plan = DENSE) -> Cost:
    """Count the tokens block by block, as in `vit`."""
    patches, keys, p = shape.num_patches, shape.num_patches, shape.num_prefix
    per_block, tokens = [], []
    for number, block in enumerate(shape.blocks):
        length, inner = p + patches, block.heads * block.head_width
        work = length * block.attention + 2 * length * (p + keys) * inner
        in_mlp = patches
        if number in shape.selects:
            before = BlockShape(p, patches, shape.width, block.heads, block.head_width)
            after = before._replace(num_patches=shape.reduce.count(patches, plan))
            work += shape.reduce.work(before, plan) + shape.connect.work(after, plan)
            patches, keys = after.num_patches, shape.connect.visible(after.num_patches, plan)
            in_mlp = patches if shape.position == "attention" else in_mlp
        per_block.append(work + (p + in_mlp) * block.mlp)
        tokens.append(length)
    left = p + patches
    pooled = left if shape.pools_prefix else patches
    total = shape.embed + sum(per_block) + shape.head + shape.pool * pooled + shape.pool_pairs * pooled**2
    return Cost(total, tuple(per_block), tuple(tokens), left)


def _block(block: Any, name: str, left: Mapping[str, float]) -> BlockWork:
    attention, mlp = f"{name}.attn", f"{name}.mlp"
    heads = round(block.attn.num_heads * left.get(attention, 1.0))
    return BlockWork(_linear(block.attn, attention, left), _linear(block.mlp, mlp, left), heads, block.attn.head_dim)


def _linear(module: nn.Module, name: str = "", left: Mapping[str, float] = MappingProxyType({})) -> int:
    """Multiply-adds of all linear layers of a module for one token."""
    return sum(
        round(m.in_features * m.out_features * left.get(f"{name}.{inner}", 1.0))
        for inner, m in module.named_modules()
        if isinstance(m, nn.Linear)
    )


def _pooling(pool: nn.Module | None) -> tuple[int, int, int]:
    """Multiply-adds of attention pooling: per token, per pair of tokens, per image."""
    if pool is None:
        return 0, 0, 0
    if type(pool).__name__ == "AttentionPoolPrr":  # not in every timm: each token attends to all, without projections
        return 0, 2 * cast(Any, pool).out_features, 0
    kv = getattr(pool, "kv", None)
    if isinstance(kv, nn.Linear):  # one latent: keys, values and its row of attention; its query, projection and MLP
        return _linear(kv) + kv.out_features, 0, _linear(pool) - _linear(kv)
    raise ValueError(
        f"attn_pool is a {type(pool).__name__}: multiply-adds are implemented for timm's AttentionPoolLatent and AttentionPoolPrr only"
    )


@dataclass(frozen=True)
class _Fixed:
    """A selection that leaves `num` patches; `reduce` ranks them."""

    num: int
    reduce: Reduce

    def __call__(self, tokens: Any, qkv: Any, plan: Plan) -> Any:
        raise NotImplementedError

    def count(self, num_patches: int, plan: Plan) -> int:
        return self.num

    def work(self, shape: BlockShape, plan: Plan) -> int:
        return self.reduce.work(shape, Plan(min(1.0, self.num / shape.num_patches)))


def cost_with(shape: Shape, num_patches: int) -> Cost:
    """The cost of an image that keeps `num_patches` patches at its pruning block (`adaptive`)."""
    return cost(replace(shape, reduce=_Fixed(num_patches, shape.reduce)))
