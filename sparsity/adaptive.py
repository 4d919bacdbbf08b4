"""A SparseViT with another number of tokens for each image after its pruning block: inference with SaiT's mass-based selection.

Blocks 0 to P run as usual, on all tokens; after block P each image keeps its own patches, and the following blocks run on them in one
of three ways with equal results: `per_image`; `padded` to the longest of the batch, with a key mask; or `packed`, all kept tokens of the
batch in one row, so that nothing is computed for padding. An image's logits never depend on its batch mates.

Letters as in `types`; S tokens of the whole batch after P, prefixes included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity import attention
from sparsity.network import SparseNetwork
from sparsity.tokens import mass as by_mass
from sparsity.types import Tokens, VisibleKeys
from sparsity.vit import SparseViT
from sparsity.vit_parts import added, parts_of

EXECUTIONS = ("packed", "padded", "per_image")


class AdaptiveOutput(NamedTuple):
    """logits: (B, classes). counts: (B,) int64 patches that each image kept after the pruning block."""

    logits: Tensor
    counts: Tensor


class AdaptiveViT(nn.Module):
    """`model` with mass-based selection after its only pruning block, by its own score. least: patches that every image keeps.

    Raises ValueError, naming the key, for a model with several pruning blocks, without one, or with mechanisms that carry state from
    block to block.
    """

    def __init__(self, model: SparseNetwork, execution: str = "packed", least: int = by_mass.LEAST) -> None:
        super().__init__()
        refuse(model)
        assert isinstance(model, SparseViT)
        if execution not in EXECUTIONS:
            raise ValueError(f"execution={execution!r}: unknown value; valid values: {', '.join(EXECUTIONS)}")
        self.model, self.execution, self.least = model, execution, least
        self.block = next(iter(model.blocks))

    def forward(self, images: Tensor, mass: float) -> AdaptiveOutput:
        """images (B, 3, height, width) float -> logits with the patches that hold `mass` of the importance of their image, in (0, 1]."""
        tokens, ranked = self.ranked(images)
        return self.finish(tokens, ranked.order, by_mass.counts(ranked.mass, mass, self.least))

    @torch.no_grad()
    def ranked(self, images: Tensor) -> tuple[Tokens, by_mass.Ranked]:
        """All tokens after the pruning block, and its patches by importance."""
        tokens, importance = self.model.until(self.block, images)
        return tokens, by_mass.rank(importance)

    @torch.no_grad()
    def finish(self, tokens: Tokens, order: Tensor, counts: Tensor) -> AdaptiveOutput:
        """The blocks after the pruning block on the first `counts` (B,) patches of each image by `order` (B, n)."""
        run: dict[str, Callable[[Tokens, Tensor, Tensor], Tensor]] = {
            "packed": self._packed,
            "padded": self._padded,
            "per_image": self._per_image,
        }
        if not len(counts):  # no image: nothing to group by length
            return AdaptiveOutput(self._head(tokens.x), counts)
        return AdaptiveOutput(run[self.execution](tokens, order, counts), counts)

    @property
    def _later(self) -> range:
        return range(self.block + 1, len(self.model.vit.blocks))

    def _per_image(self, tokens: Tokens, order: Tensor, counts: Tensor) -> Tensor:
        found = []
        for row, count in enumerate(counts.tolist()):
            index = positions(order[row : row + 1, :count], tokens.num_prefix)
            one = tokens.with_(x=attention.gather_tokens(tokens.x[row : row + 1], index, 1), ids=order[row : row + 1, :count])
            found.append(self._head(self.model.blocks_from(self._later, one).x))
        return torch.cat(found)

    def _padded(self, tokens: Tokens, order: Tensor, counts: Tensor) -> Tensor:
        longest = int(counts.max())
        chosen = _in_order(order[:, :longest], counts)
        x = attention.gather_tokens(tokens.x, positions(chosen, tokens.num_prefix), 1)  # (B, p + longest, D)
        visible = torch.arange(x.shape[1], device=x.device) < (tokens.num_prefix + counts)[:, None]
        keys = VisibleKeys(mask=visible[:, None, None, :])  # (B, 1, 1, T): the same for all queries
        x = self.model.blocks_from(self._later, tokens.with_(x=x, ids=chosen, keys=keys)).x
        logits: Tensor | None = None
        for count, rows in _by_length(counts):
            part = self._head(x[rows, : tokens.num_prefix + count])
            logits = part.new_empty(len(x), *part.shape[1:]) if logits is None else logits
            logits[rows] = part
        assert logits is not None
        return logits

    def _packed(self, tokens: Tokens, order: Tensor, counts: Tensor) -> Tensor:
        p = tokens.num_prefix
        lengths, rows = (counts + p).sort(
            stable=True
        )  # images of equal length stand together: their attention is one SDPA call
        longest = int(lengths[-1])
        chosen = _in_order(order[rows, : longest - p], lengths - p)
        there = torch.arange(longest, device=counts.device) < lengths[:, None]  # (B, longest)
        x = attention.gather_tokens(tokens.x[rows], positions(chosen, p), 1)[there][None]  # (1, S, D)
        packing = Packing.of(lengths)
        for number in self._later:
            block: Any = self.model.vit.blocks[number]
            before_attention, after_attention, before_mlp, after_mlp = parts_of(block)
            x = added(x, after_attention(attend_packed(block.attn, before_attention(x), packing)))
            x = added(x, after_mlp(block.mlp(before_mlp(x))))
        logits = torch.cat([self._head(x[0, start:end].unflatten(0, (-1, length))) for start, end, length in packing.groups])
        return torch.empty_like(logits).index_copy_(0, rows, logits)

    def _head(self, x: Tensor) -> Tensor:
        """Logits of images with equally many tokens: (G, T, D) -> (G, classes)."""
        return self.model.vit.forward_head(self.model.vit.norm(x))


class Packing(NamedTuple):
    """Where the images of a packed row stand. offsets: (B + 1,) int32. groups: (start, end, length) in tokens of runs of images of equal
    length. longest: tokens of the longest image."""

    offsets: Tensor
    groups: list[tuple[int, int, int]]
    longest: int

    @classmethod
    def of(cls, lengths: Tensor) -> Packing:
        """From the lengths of the images, (B,) int64, rising."""
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        groups, start = [], 0
        values, repeats = lengths.unique_consecutive(return_counts=True)
        for length, images in zip(values.tolist(), repeats.tolist(), strict=True):
            groups.append((start, start + length * images, length))
            start += length * images
        return cls(offsets, groups, int(lengths[-1]))


def attend_packed(module: Any, x: Tensor, packing: Packing) -> Tensor:
    """Attention of a packed row, each image among its own tokens: (1, S, D) -> (1, S, D). On a GPU in half precision one kernel of
    variable lengths; else one scaled_dot_product_attention per group of images of equal length."""
    qkv = attention.project_qkv(module, x)  # each (1, H, S, d)
    if x.is_cuda and qkv.q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (t[0].transpose(0, 1).contiguous() for t in qkv[:3])  # (S, H, d)
        offsets, longest = packing.offsets, packing.longest
        out = varlen_attn(q, k, v, offsets, offsets, longest, longest)
        assert isinstance(out, Tensor)
        return attention.project(module, out.transpose(0, 1)[None], x)
    parts = []
    for start, end, length in packing.groups:
        q, k, v = (t[0, :, start:end].unflatten(1, (-1, length)).transpose(0, 1) for t in qkv[:3])  # (G, H, length, d)
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))  # (G * length, H, d)
    return attention.project(module, torch.cat(parts).transpose(0, 1)[None], x)


def positions(chosen: Tensor, num_prefix: int) -> Tensor:
    """Positions in T of the prefix and of patches: (B, k) -> (B, p + k)."""
    prefix = torch.arange(num_prefix, device=chosen.device).expand(len(chosen), -1)
    return torch.cat((prefix, chosen + num_prefix), dim=1)


def refuse(model: SparseNetwork) -> None:
    """Raises ValueError, naming the key, for a model whose tokens cannot differ in number between images."""
    if not isinstance(model, SparseViT):
        raise ValueError(
            f"a {type(model.network).__name__} has the same number of tokens for every image; choose a network of {SparseViT.models}"
        )
    if len(model.blocks) != 1:
        raise ValueError(
            f"tokens.blocks={sorted(model.blocks)}: mass-based selection needs exactly one pruning block; set e.g. tokens.blocks=[2]"
        )
    if model.position != "block":
        raise ValueError(
            f"tokens.position={model.position}: mass-based selection drops tokens after the whole block; set tokens.position=block"
        )
    if model.attend is not attention.fused:
        raise ValueError("compat=authors: mass-based selection uses timm's attention; set compat=none")
    if model.connects:
        raise ValueError("connections: mass-based selection keeps every connection; set connections.method=all")


def _in_order(order: Tensor, counts: Tensor) -> Tensor:
    """The first `counts` entries of each row in rising order of position, then the rest: (B, k) -> (B, k)."""
    past = torch.arange(order.shape[1], device=order.device) >= counts[:, None]
    ranks = (order + past * (int(order.max()) + 1)).argsort(dim=1)
    return order.gather(1, ranks)


def _by_length(counts: Tensor) -> list[tuple[int, Tensor]]:
    """The rows of each count: [(count, rows int64)]."""
    return [(int(count), (counts == count).nonzero()[:, 0]) for count in counts.unique()]
