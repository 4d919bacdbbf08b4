"""Levels 2 and 3 by name, and the network with them: a new mechanism is one file and one row here."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer

from sparsity import attention
from sparsity.connections import CONNECTIONS
from sparsity.tokens import TOKENS
from sparsity.types import MechanismOptions
from sparsity.vit import SparseViT, refuse


def build(
    vit: VisionTransformer,
    *,
    tokens: str = "all",
    connections: str = "all",
    blocks: Sequence[int] = (3, 6, 9),
    position: str = "attention",
    fuse: bool = False,
    merged: int = 0,
    compat: str = "none",
) -> SparseViT:
    """`vit` with the named mechanisms in `blocks`. Raises ValueError, with the key to change, for what doesn't go together."""
    refuse(vit)
    for key, name, names in (("tokens", tokens, TOKENS), ("connections", connections, CONNECTIONS)):
        if name not in names:
            raise ValueError(f"{key}.method={name!r}: unknown; there are {', '.join(names)}")
    _refuse_misfits(vit, tokens, connections, blocks, fuse, merged, compat)
    options = MechanismOptions(vit.has_class_token, fuse, merged, compat == "authors", connections != "all")
    return SparseViT(
        vit,
        reduce=TOKENS[tokens](options),
        connect=CONNECTIONS[connections](options),
        blocks=() if tokens == connections == "all" else blocks,
        position=position,
        attend=attention.authors if compat == "authors" else attention.fused,
    )


def _refuse_misfits(
    vit: VisionTransformer, tokens: str, connections: str, blocks: Sequence[int], fuse: bool, merged: int, compat: str
) -> None:
    def no(text: str) -> None:
        raise ValueError(text)

    active = not tokens == connections == "all"
    if active and not blocks:
        no(f"tokens.blocks=[] with tokens.method={tokens}, connections.method={connections}: name the blocks, e.g. [3, 6, 9]")
    if active and max(blocks) >= len(vit.blocks):
        no(f"tokens.blocks={list(blocks)}: this network has blocks 0 to {len(vit.blocks) - 1}")
    if fuse and tokens not in ("topk", "random"):
        no(f"tokens.fuse=true with tokens.method={tokens}: only what is dropped can be fused; choose topk, or set fuse=false")
    if merged and tokens != "tome":
        no(f"tokens.merged={merged} with tokens.method={tokens}: only tome merges; choose it, or set merged=0")
    if tokens == "tome" and vit.global_pool not in ("token", "map", "prr"):
        no(f"tokens.method=tome with global_pool={vit.global_pool!r}: the mean would count a merged token once; choose topk")
    if connections == "shared_keys" and not vit.has_class_token:
        no("connections.method=shared_keys: this network has no [CLS] token to rank keys by; choose shared_keys_column")
    if compat not in ("none", "authors"):
        no(f"compat={compat!r}: there are none, authors")
    if compat == "authors" and (not vit.has_class_token or vit.num_prefix_tokens != 1):
        no(
            "compat=authors: the reference code knows no prefix token but [CLS]; choose a plain deit or vit model, or compat=none"
        )
    if compat == "authors" and (fuse or tokens not in ("all", "topk") or connections not in ("all", "exact")):
        no(
            f"compat=authors with tokens.method={tokens}, fuse={str(fuse).lower()}, connections.method={connections}: the reference "
            "code has topk without fusion and exact; choose those, or compat=none"
        )
