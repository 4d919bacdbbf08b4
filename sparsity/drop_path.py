"""Drop path by numbers drawn for each image in place of the global generator: a mask then follows its image, whatever the rank, the
micro-batch and the batch mates."""

from __future__ import annotations

from collections.abc import Iterable

from timm.layers import DropPath
from torch import Tensor, nn

from sparsity import keyed_random

SALT = 0x70617468


def draw(rng_keys: Tensor, number: int) -> Tensor:
    """(B,) int64 -> (B, number) float32 in [0, 1)."""
    return keyed_random.uniform(rng_keys, SALT, shape=(number,))


def dropped(path: DropPath, x: Tensor, drawn: Tensor) -> Tensor:
    """timm's stochastic depth of a branch, with the numbers drawn for each image in [0, 1), which must broadcast with x (B, ...).

    As many kernels as timm's own: at small batches a step is bound by kernel launches.
    """
    keep = 1.0 - path.drop_prob
    stays = drawn < keep
    scaled = stays / keep if path.scale_by_keep and keep > 0.0 else stays
    return x * scaled.to(x.dtype)


def of_branch(path: nn.Module, x: Tensor, drawn: Tensor | None, branch: int) -> Tensor:
    """Stochastic depth of a branch (B, T, D): by timm's module, or by the numbers drawn for each image, (2, B, 1, 1) in [0, 1)."""
    if drawn is None or not isinstance(path, DropPath) or path.drop_prob == 0.0:
        return path(x)
    return dropped(path, x, drawn[branch])


class KeyedDropPath(DropPath):
    """timm's DropPath, which takes the numbers in `drawn` if there are any: one tensor (B,) for each call of a forward pass, in turn.

    They stay until the next forward pass, because gradient checkpointing runs parts of it once more during the backward pass: a part
    contains all calls of its own modules, so the turns begin anew there.
    """

    def __init__(self, path: DropPath) -> None:
        super().__init__(path.drop_prob, path.scale_by_keep)
        self.training = path.training
        self.calls, self.turn = 1, 0  # per forward pass; of the next call
        self.drawn: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.drawn is None or not self.training or self.drop_prob == 0.0:
            return super().forward(x)
        drawn = self.drawn[self.turn]
        if self.calls > 1:
            self.turn = (self.turn + 1) % self.calls
        return dropped(self, x, drawn.view(-1, *(1,) * (x.ndim - 1)))


def replaced(network: nn.Module) -> list[KeyedDropPath]:
    """Replace timm's DropPath modules, which have no parameters, by keyed ones; all of them in the order of the network."""
    found: list[KeyedDropPath] = []
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is DropPath:
                setattr(parent, name, KeyedDropPath(child))
            path = getattr(parent, name)
            if isinstance(path, KeyedDropPath) and path not in found:
                found.append(path)
    return found


def set_drawn(paths: Iterable[KeyedDropPath], rng_keys: Tensor | None, number: int) -> None:
    """Give each path its numbers for this forward pass, by the images' keys (B,); None: the global generator. number: calls of all."""
    drawn = None if rng_keys is None else draw(rng_keys, number).unbind(1)
    at = 0
    for path in paths:
        path.turn = 0
        path.drawn = None if drawn is None else tuple(drawn[at : at + path.calls])
        at += path.calls
