"""What `SparseViT` and `adaptive` share of a forward pass: the outputs asked for, by name, and the parts of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.models.vision_transformer import ResPostBlock
from torch import Tensor


class Wanted(NamedTuple):
    """The names in `outputs`, parsed."""

    cls_attention: bool
    importance: int | None
    kept: bool
    keys: bool

    @classmethod
    def parse(cls, outputs: frozenset[str], depth: int) -> Wanted:
        importance = None
        for wish in outputs:
            name, _, number = wish.partition(":")
            if name == "importance" and number.isdigit() and int(number) < depth:
                importance = int(number)
            elif wish not in ("cls_attention", "kept", "keys"):
                raise ValueError(
                    f"outputs={wish!r}: unknown value; valid values: cls_attention, importance:<block 0..{depth - 1}>, kept, keys"
                )
        return cls("cls_attention" in outputs, importance, "kept" in outputs, "keys" in outputs)


NOTHING = Wanted(False, None, False, False)


def parts_of(block: Any) -> tuple[Callable, Callable, Callable, Callable]:
    """The modules before and after attention and MLP: norm and LayerScale, or identity and norm."""
    if isinstance(block, ResPostBlock):
        return _same, block.norm1, _same, block.norm2
    return block.norm1, block.ls1, block.norm2, block.ls2


def _same(x: Tensor) -> Tensor:
    return x


def added(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch in the type of x: under autocast a LayerScale in float32 would widen bf16 tokens."""
    return (x + branch).to(x.dtype)
