"""Builds the network with the mechanisms of levels 2 and 3, by settings or by name."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer

from sparsity import attention
from sparsity.connections import CONNECTIONS
from sparsity.settings import ConnectionSettings, Network, TokenSettings, choose
from sparsity.tokens import TOKENS
from sparsity.vit import SparseViT, refuse


def build(
    vit: VisionTransformer,
    *,
    tokens: TokenSettings | str = "all",
    connections: ConnectionSettings | str = "all",
    blocks: Sequence[int] = (3, 6, 9),
    position: str = "attention",
    compat: str = "none",
) -> SparseViT:
    """`vit` with a mechanism of each level in `blocks`; a name stands for its method with default settings.

    Raises ValueError, with the key to change, for settings that contradict each other.
    """
    refuse(vit)
    tokens = choose(TOKENS, tokens)() if isinstance(tokens, str) else tokens
    connections = choose(CONNECTIONS, connections)() if isinstance(connections, str) else connections
    off = tokens.off and connections.off
    if not off:
        _refuse_blocks(blocks, len(vit.blocks))
    _refuse_compat(vit, tokens, connections, compat)
    authors = compat == "authors"
    network = Network(vit.has_class_token, vit.global_pool, carry_qkv=not connections.off, authors=authors)
    return SparseViT(
        vit,
        reduce=tokens.build(network),
        connect=connections.build(network),
        blocks=() if off else blocks,
        position=position,
        attend=attention.authors if authors else attention.fused,
    )


def _refuse_blocks(blocks: Sequence[int], depth: int) -> None:
    if not blocks:
        raise ValueError("tokens.blocks=[]: no block selects tokens or connections; name the blocks, e.g. [3, 6, 9]")
    if max(blocks) >= depth:
        raise ValueError(f"tokens.blocks={list(blocks)}: this network has blocks 0 to {depth - 1}; change tokens.blocks")


def _refuse_compat(vit: VisionTransformer, tokens: TokenSettings, connections: ConnectionSettings, compat: str) -> None:
    if compat not in ("none", "authors"):
        raise ValueError(f"compat={compat!r}: unknown value; valid values: none, authors")
    if compat == "none":
        return
    if not vit.has_class_token or vit.num_prefix_tokens != 1:
        raise ValueError(
            "compat=authors: the reference code has no prefix token but [CLS]; choose a plain deit or vit model, or compat=none"
        )
    if not (tokens.in_reference_code and connections.in_reference_code):
        names = (
            next((name for name, kind in methods.items() if kind is type(settings)), type(settings).__name__)
            for methods, settings in ((TOKENS, tokens), (CONNECTIONS, connections))
        )
        raise ValueError(
            "compat=authors with tokens.method={}, connections.method={}: the reference code has tokens.method=topk without "
            "tokens.fuse, and connections.method=exact; choose those, or compat=none".format(*names)
        )
