"""What `SparseViT` does not run, each as a ValueError that names the part or the key: other networks than a plain timm VisionTransformer,
blocks that it does not have, and what the reference code has no form of."""

from __future__ import annotations

from collections.abc import Callable, Collection

from timm.layers import Attention, DropPath, PatchDropout
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from sparsity.connections import CONNECTIONS
from sparsity.network import Levels
from sparsity.settings import Network
from sparsity.tokens import TOKENS


def refuse(vit: nn.Module) -> None:
    """Raises ValueError, naming the part, for a network whose forward pass `SparseViT` cannot reproduce bit for bit."""
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"{type(vit).__name__} is not a timm VisionTransformer; choose a vit_* or deit* model of timm")
    for method in ("forward", "forward_features"):
        if getattr(type(vit), method) is not getattr(VisionTransformer, method):
            raise ValueError(f"{type(vit).__name__} has a {method} of its own, not timm's; choose a plain vit_* or deit* model")
    if not vit.global_pool:
        raise ValueError(f"{type(vit).__name__} with global_pool='' returns tokens, not logits")
    for number, block in enumerate(vit.blocks):
        if type(block) not in (Block, ResPostBlock):
            raise ValueError(f"block {number} is a {type(block).__name__}; only timm's Block and ResPostBlock are supported")
        if type(block.attn) is not Attention:
            raise ValueError(
                f"the attention of block {number} is a {type(block.attn).__name__}; only timm's Attention is supported"
            )
        for path in (block.drop_path1, block.drop_path2):
            if type(path) not in (DropPath, nn.Identity):
                raise ValueError(
                    f"the drop path of block {number} is a {type(path).__name__}; only timm's DropPath is supported"
                )
    if any(isinstance(part, DropPath) and part.drop_prob for part in vit.patch_embed.modules()):
        raise ValueError(
            f"the {type(vit.patch_embed).__name__} of this network has drop path, which is keyed by image in blocks only"
        )
    drop = vit.patch_drop
    if type(drop) not in (PatchDropout, nn.Identity):
        raise ValueError(f"patch_drop is a {type(drop).__name__}; only timm's PatchDropout is supported")
    if isinstance(drop, PatchDropout) and drop.num_prefix_tokens != vit.num_prefix_tokens:
        raise ValueError(
            f"{type(vit).__name__} with patch_drop_rate={drop.prob}: timm protects only {drop.num_prefix_tokens} of "
            f"{vit.num_prefix_tokens} prefix tokens and may drop the distillation token; set patch_drop_rate=0"
        )


def about(vit: VisionTransformer, position: str) -> Network:
    """What a mechanism of level 2 at `position` asks of the network."""
    return Network(vit.has_class_token, vit.global_pool, num_prefix=vit.num_prefix_tokens, position=position)


def text_of(check: Callable[[nn.Module], None], network: nn.Module) -> str:
    """The message of the ValueError that `check` raises; "" if it raises none."""
    try:
        check(network)
    except ValueError as error:
        return str(error)
    return ""


def refuse_blocks(blocks: Collection[int], depth: int, position: str) -> None:
    if not blocks:
        raise ValueError("tokens.blocks=[]: no block selects tokens or connections; name the blocks, e.g. [3, 6, 9]")
    if max(blocks) >= depth:
        raise ValueError(f"tokens.blocks={list(blocks)}: this network has blocks 0 to {depth - 1}; change tokens.blocks")
    if position == "block" and max(blocks) == depth - 1:
        raise ValueError(
            f"tokens.blocks={list(blocks)} with tokens.position=block: tokens would leave after the last block, which saves nothing; "
            f"name blocks of 0 to {depth - 2}, e.g. tokens.blocks=[{min(2, depth - 2)}], or set tokens.position=attention"
        )


def refuse_compat(vit: VisionTransformer, levels: Levels) -> None:
    """Raises ValueError where the reference code has no such network or method."""
    if not vit.has_class_token or vit.num_prefix_tokens != 1:
        raise ValueError(
            "compat=authors: the reference code has no prefix token but [CLS]; choose a plain deit or vit model, or compat=none"
        )
    if not (levels.tokens.in_reference_code and levels.connections.in_reference_code):
        names = (
            next((name for name, kind in methods.items() if kind is type(settings)), type(settings).__name__)
            for methods, settings in ((TOKENS, levels.tokens), (CONNECTIONS, levels.connections))
        )
        raise ValueError(
            "compat=authors with tokens.method={}, connections.method={}: the reference code has tokens.method=topk without "
            "tokens.fuse, and connections.method=exact; choose those, or compat=none".format(*names)
        )
