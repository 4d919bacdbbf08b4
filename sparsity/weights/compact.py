"""Units and heads cut out: the smaller dense layers, which compute what the masked ones do, and a timm network of their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparsity.weights.groups import Heads, Site, Units, Weights


def cut(sites: Sequence[Site], weights: Weights, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the sites with only the kept units and heads: whole rows of fc1 and qkv, whole columns of fc2 and proj. Raises
    ValueError for groups that are no whole rows and columns."""
    found = {}
    for site in sites:
        if not isinstance(site, Units | Heads):
            raise ValueError(f"{site.name}: columns and rows of blocks leave no smaller dense layer")
        for name, mask in site.spread(kept[site.name]).items():
            rows = mask if mask.ndim == 1 else mask.any(1)
            part = weights[name][rows]
            found[name] = (part[:, mask.any(0)] if mask.ndim == 2 else part).contiguous()
    return found


def changes_tokens(sites: Sequence[Site], tokens: Any) -> str:
    """Which setting of level 2 gives other tokens once pruned heads are cut out, as key=value; "" for none. A masked head is flat: it adds
    a constant to the mean over heads. That keeps the order of attention scores, not that of `value_norm`, nor the weights of a fused token.

    tokens: settings of the method of tokens.
    """
    if tokens.off or not any(isinstance(site, Heads) for site in sites):
        return ""
    if getattr(tokens, "importance", "") == "value_norm":
        return "tokens.importance=value_norm"
    return "tokens.fuse=true" if getattr(tokens, "fuse", False) else ""


def sizes_of(sites: Sequence[Site], kept: Mapping[str, Tensor]) -> dict[str, int]:
    """{site: kept units or heads}"""
    return {site.name: int(kept[site.name].sum()) for site in sites}


def uniform_ratio(vit: VisionTransformer, sizes: Mapping[str, int]) -> float | None:
    """timm's `mlp_ratio` that builds MLPs of these sizes; None unless every MLP has the same size and no attention is smaller."""
    mlps = {f"blocks.{number}.mlp" for number in range(len(vit.blocks))}
    if sizes.keys() != mlps or len(set(sizes.values())) > 1:
        return None
    (units,) = set(sizes.values())
    ratio = units / vit.embed_dim
    return ratio if int(vit.embed_dim * ratio) == units else (units + 0.5) / vit.embed_dim  # timm rounds down


def shrink(vit: VisionTransformer, sizes: Mapping[str, int]) -> None:
    """Give MLPs and attentions of `vit`, in place, so many units or heads; their weights are not those of before. Raises ValueError for a
    name or a size that the network cannot have."""
    modules = dict(vit.named_modules())
    for name, size in sizes.items():
        module = cast(Any, modules.get(name))
        if name.endswith(".mlp") and module is not None and 0 < size <= module.fc1.out_features:
            module.fc1 = _linear(module.fc1, module.fc1.in_features, size)
            module.fc2 = _linear(module.fc2, size, module.fc2.out_features)
        elif name.endswith(".attn") and module is not None and 0 < size <= module.num_heads:
            inner = size * module.head_dim
            module.qkv = _linear(module.qkv, module.qkv.in_features, 3 * inner)
            module.proj = _linear(module.proj, inner, module.proj.out_features)
            module.num_heads, module.attn_dim = size, inner
        else:
            raise ValueError(f"{name}={size}: the network has no such MLP or attention, or a smaller one")


def _linear(like: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, like.bias is not None, device=like.weight.device, dtype=like.weight.dtype)
