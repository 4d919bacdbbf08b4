"""What is pruned together: columns or rows inside the p x q blocks of a linear layer, hidden units of an MLP, heads of an attention.

A `Site` maps groups to elements and back. Its groups are an array (blocks, groups in a block); elements that padding adds belong to
groups of count 0. **Padding rule**: a layer whose size is no multiple of p or q is padded with zero rows and columns, so its last blocks
are smaller; a block larger than the layer is the layer.

Letters: O outputs and I inputs of a linear layer, p x q its blocks, R = ceil(O / p) and C = ceil(I / q) blocks; H hidden units or heads,
D width, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

Weights = Mapping[str, Tensor]  # parameters by timm's name


class Site(Protocol):
    """The groups of one layer, or of layers that are pruned together."""

    @property
    def name(self) -> str:
        """Of the module."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its parameters, by timm's names."""
        ...

    def energy(self, weights: Weights) -> Tensor:
        """Sum of squares of each group, (blocks, groups), in the dtype of the weights, float32 at least."""
        ...

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """The value of each group, (blocks, groups), at every element of it: one tensor per parameter, in its shape."""
        ...

    def counts(self, like: Tensor | None = None) -> Tensor:
        """Elements of each group, (blocks, groups) int64; 0 for padding. like: a tensor on the device of the result."""
        ...


@dataclass(frozen=True)
class Block:
    """Columns (`axis` 1) or rows (`axis` 0) inside the p x q blocks of the weight (O, I) of the linear layer `name`; blocks row by row."""

    name: str
    outputs: int
    inputs: int
    size: tuple[int, int]
    axis: int = 1

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.weight: (self.outputs, self.inputs)}

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(R, p, C, q)"""
        p, q = min(self.size[0], self.outputs), min(self.size[1], self.inputs)
        return -(-self.outputs // p), p, -(-self.inputs // q), q

    def blocks(self, weight: Tensor) -> Tensor:
        """(O, I) -> (R, p, C, q), padded with zeros."""
        rows, p, columns, q = self.grid
        padded = F.pad(weight, (0, columns * q - self.inputs, 0, rows * p - self.outputs))
        return padded.view(rows, p, columns, q)

    def energy(self, weights: Weights) -> Tensor:
        rows, p, columns, q = self.grid
        squares = self.blocks(_wide(weights[self.weight]).square())
        if self.axis == 1:
            return squares.sum(1).reshape(rows * columns, q)
        return squares.sum(3).permute(0, 2, 1).reshape(rows * columns, p)

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        rows, p, columns, q = self.grid
        if self.axis == 1:
            whole = values.view(rows, 1, columns, q).expand(rows, p, columns, q)
        else:
            whole = values.view(rows, columns, p).permute(0, 2, 1)[..., None].expand(rows, p, columns, q)
        whole = whole.reshape(rows * p, columns * q)  # (R, p, C, q) -> padded (O, I)
        return {self.weight: whole[: self.outputs, : self.inputs].contiguous()}

    def counts(self, like: Tensor | None = None) -> Tensor:
        device = None if like is None else like.device
        ones = torch.ones(self.outputs, self.inputs, device=device)
        return self.energy({self.weight: ones}).long()


@dataclass(frozen=True)
class Units:
    """The hidden units of an MLP: row h of fc1 with its bias, and column h of fc2. One block of H groups."""

    name: str
    width: int
    hidden: int
    bias: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.name}.fc1.weight": (self.hidden, self.width),
            f"{self.name}.fc2.weight": (self.width, self.hidden),
        }
        return shapes | ({f"{self.name}.fc1.bias": (self.hidden,)} if self.bias else {})

    def energy(self, weights: Weights) -> Tensor:
        found = [_wide(weights[name]).square() for name in self.shapes]
        first, second, *bias = found
        return sum(bias, first.sum(1) + second.sum(0))[None]

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        (unit,) = values  # (H,)
        spread = {
            f"{self.name}.fc1.weight": unit[:, None].expand(self.hidden, self.width).contiguous(),
            f"{self.name}.fc2.weight": unit[None].expand(self.width, self.hidden).contiguous(),
        }
        return spread | ({f"{self.name}.fc1.bias": unit.clone()} if self.bias else {})

    def counts(self, like: Tensor | None = None) -> Tensor:
        device = None if like is None else like.device
        return torch.full((1, self.hidden), 2 * self.width + self.bias, device=device)


@dataclass(frozen=True)
class Heads:
    """The heads of an attention: their rows of queries, keys and values with the bias, and their columns of the projection. One block."""

    name: str
    width: int
    heads: int
    head_width: int
    bias: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        inner = self.heads * self.head_width
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.name}.qkv.weight": (3 * inner, self.width),
            f"{self.name}.proj.weight": (self.width, inner),
        }
        return shapes | ({f"{self.name}.qkv.bias": (3 * inner,)} if self.bias else {})

    def energy(self, weights: Weights) -> Tensor:
        first, second, *bias = (_wide(weights[name]).square() for name in self.shapes)
        found = first.view(3, self.heads, -1).sum((0, 2)) + second.view(self.width, self.heads, -1).sum((0, 2))
        return sum((one.view(3, self.heads, -1).sum((0, 2)) for one in bias), found)[None]

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        inner = values[0].repeat_interleave(self.head_width)  # (H,) -> (H d,)
        three = inner.repeat(3)
        spread = {
            f"{self.name}.qkv.weight": three[:, None].expand(len(three), self.width).contiguous(),
            f"{self.name}.proj.weight": inner[None].expand(self.width, len(inner)).contiguous(),
        }
        return spread | ({f"{self.name}.qkv.bias": three} if self.bias else {})

    def counts(self, like: Tensor | None = None) -> Tensor:
        device = None if like is None else like.device
        each = self.head_width * (4 * self.width + 3 * self.bias)
        return torch.full((1, self.heads), each, device=device)


def block_sites(vit: nn.Module, size: tuple[int, int], axis: int) -> list[Block]:
    """The linear layers of the transformer blocks."""
    return [
        Block(name, module.out_features, module.in_features, size, axis)
        for name, module in vit.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    ]


def unit_sites(vit: nn.Module) -> list[Units]:
    """The MLPs of the transformer blocks. Raises ValueError, naming it, for one whose units are not rows of fc1 and columns of fc2."""
    return [_units(name, module) for name, module in _of_blocks(vit, "mlp")]


def head_sites(vit: nn.Module) -> list[Heads]:
    """The attentions of the transformer blocks. Raises ValueError, naming the module, for one whose heads depend on each other."""
    return [_heads(name, module) for name, module in _of_blocks(vit, "attn")]


def _units(name: str, module: nn.Module) -> Units:
    if type(module) is not Mlp:
        raise ValueError(
            f"weights.groups=units: {name} is a {type(module).__name__}, not timm's Mlp; set weights.groups=columns"
        )
    fc1 = cast(nn.Linear, module.fc1)
    if not isinstance(module.norm, nn.Identity):
        raise ValueError(
            f"weights.groups=units: {name} normalises its units, so they depend on each other; set weights.groups=columns"
        )
    if float(module.act(torch.zeros(()))) != 0.0:
        raise ValueError(
            f"weights.groups=units: {type(module.act).__name__} of {name} is not 0 at 0, so a pruned unit would still add to the output; "
            "set weights.groups=columns"
        )
    return Units(name, fc1.in_features, fc1.out_features, fc1.bias is not None)


def _heads(name: str, module: nn.Module) -> Heads:
    if type(module) is not Attention:
        raise ValueError(
            f"weights.groups=heads: {name} is a {type(module).__name__}, not timm's Attention; set weights.groups=columns"
        )
    if not isinstance(module.norm, nn.Identity) or getattr(module, "gate", None) is not None:
        raise ValueError(
            f"weights.groups=heads: {name} normalises or gates all heads together, so they depend on each other; set weights.groups=columns"
        )
    return Heads(name, module.qkv.in_features, module.num_heads, module.head_dim, module.qkv.bias is not None)


def _of_blocks(vit: nn.Module, part: str) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in vit.named_modules()
        if name.startswith("blocks.") and name.count(".") == 2 and name.endswith(f".{part}")
    ]


def matches(name: str, pattern: str) -> bool:
    """Whether the name of a module fits a pattern of `weights.layers`: all of it, or its end from a dot on ("mlp.fc1")."""
    return fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}")


def _wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
