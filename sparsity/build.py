"""Builds the network with the mechanisms of levels 2 and 3, by settings or by name, in the family that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from sparsity.connections import CONNECTIONS
from sparsity.dense import Dense
from sparsity.network import Levels, SparseNetwork
from sparsity.settings import ConnectionSettings, TokenSettings, choose
from sparsity.swin.network import SparseSwin
from sparsity.tokens import TOKENS
from sparsity.vit import SparseViT

FAMILIES: dict[str, type[SparseNetwork]] = {"vit": SparseViT, "swin": SparseSwin, "dense": Dense}
"""By name; the first one that can run a network does. The last takes every network, without levels 2 to 4."""


def build(
    network: nn.Module,
    *,
    tokens: TokenSettings | str = "all",
    connections: ConnectionSettings | str = "all",
    blocks: Sequence[int] = (3, 6, 9),
    position: str = "attention",
    compat: str = "none",
    image_size: int | None = None,
) -> SparseNetwork:
    """`network` of timm with a mechanism of each level in `blocks`; a name stands for its method with default settings. image_size: side
    of the images in pixels, for networks that take any size.

    Raises ValueError, with the key to change, for settings that contradict each other or that the family does not support.
    """
    tokens = choose(TOKENS, tokens)() if isinstance(tokens, str) else tokens
    connections = choose(CONNECTIONS, connections)() if isinstance(connections, str) else connections
    if compat not in ("none", "authors"):
        raise ValueError(f"compat={compat!r}: unknown value; valid values: none, authors")
    levels = Levels(tokens, connections, tuple(blocks), position, compat, image_size)
    reasons = [family.why_not(network) for family in FAMILIES.values()]
    family = list(FAMILIES.values())[reasons.index("")]
    if family is Dense or (levels.off and family.uncounted(network)):  # computed whole, every network can be counted
        family = Dense
        _refuse_levels(network, levels, reasons)
    return family.of(network, levels)


def _refuse_levels(network: nn.Module, levels: Levels, reasons: Sequence[str]) -> None:
    """Raises ValueError for levels 2 and 3, and the form of the reference code, of a network that is computed whole."""
    wanted = [f"compat={levels.compat}"] if levels.compat != "none" else []
    for methods, settings in ((TOKENS, levels.tokens), (CONNECTIONS, levels.connections)):
        if not settings.off:
            name = next((name for name, kind in methods.items() if kind is type(settings)), type(settings).__name__)
            wanted.append(f"{settings.section}.method={name}")
    reason = "; ".join(reason.partition("; choose")[0] for reason in reasons if reason)
    if wanted:
        raise ValueError(
            f"{', '.join(wanted)}: a {type(network).__name__} keeps all tokens and connections ({reason}); "
            f"choose a network of {can(lambda family: family is not Dense)}, or leave out examples only: tokens.method=all, "
            "connections.method=all, compat=none"
        )


def can(fits: Callable[[type[SparseNetwork]], bool]) -> str:
    """The families with a property, for messages."""
    return " or ".join(family.models for family in FAMILIES.values() if fits(family))
