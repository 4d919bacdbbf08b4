"""The blocks of one Swin stage: on all tokens in timm's own form; on the tokens that are kept; or as the reference code computes it.

Letters as in `windows`. Blocks are counted within the stage, from 0. paths: for each block the numbers drawn for drop path,
(2, B, 1, 1), of attention and MLP; None: timm's modules draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsity import drop_path
from sparsity.swin import authors, forms, windows
from sparsity.tokens import scores
from sparsity.types import Tokens, num_kept


class Selection(NamedTuple):
    """blocks: that select. share: kept by each. score: "received" or "random". position: "attention" (before the MLP) or "block"."""

    blocks: frozenset[int]
    share: float
    score: str
    position: str

    def leaves(self, block: int, number: int) -> int:
        """How many of `number` tokens are left after the selection of a block."""
        return num_kept(number, self.share) if block in self.blocks else number


class Ran(NamedTuple):
    """x: (B, H, W, D) after the stage. kept: {block: (B, k) int64 places in the grid}. received: of the last block, (B, k) float32,
    if asked for."""

    x: Tensor
    kept: dict[int, Tensor]
    received: Tensor | None = None


def whole(stage: Any, x: Tensor, paths: Sequence[Tensor] | None, asked: bool) -> Ran:
    """All blocks on all tokens x (B, H, W, D). asked: for `received`."""
    received = None
    for at, block in enumerate(stage.blocks):
        if asked and at == len(stage.blocks) - 1:
            received = _received_of_all(block, x)
        x = _checkpointed(stage, partial(_timms, block), x, None if paths is None else paths[at])
    return Ran(x, {}, received)


def selecting(
    stage: Any, x: Tensor, selection: Selection, paths: Sequence[Tensor] | None, rng_keys: Tensor | None, asked: bool
) -> Ran:
    """Blocks on the kept tokens of x (B, H, W, D). A token that is left out keeps the value that it had then."""
    shape, kept, received = x.shape, {}, None
    tokens = x.flatten(1, 2)
    ids = torch.arange(tokens.shape[1], device=x.device).expand(x.shape[0], -1)
    out: list[Tensor] = []
    out_ids: list[Tensor] = []
    for at, block in enumerate(stage.blocks):
        path = None if paths is None else paths[at]
        if not out and at not in selection.blocks:  # nothing is left out yet
            tokens = _checkpointed(stage, partial(_timms, block), tokens.view(shape), path).flatten(1, 2)
            continue
        row = asked and at == len(stage.blocks) - 1
        one = partial(_kept, block, selection, at, row)
        tokens, ids, left, left_ids, received = _checkpointed(stage, one, tokens, ids, path, rng_keys)
        out, out_ids = [*out, left], [*out_ids, left_ids]
        if at in selection.blocks:
            kept[at] = ids
    tokens, ids = torch.cat((tokens, *out), dim=1), torch.cat((ids, *out_ids), dim=1)
    x = windows.put(tokens, ids)
    return Ran(x.view(shape), kept, received if asked else None)


def as_authors(stage: Any, x: Tensor, selection: Selection, paths: Sequence[Tensor] | None, asked: bool) -> Ran:
    """x (B, H, W, D) in the form of the reference code. kept: the visible tokens of each image, then -1."""
    number, kept, score = x.shape[1] * x.shape[2], {}, None
    visible = torch.ones(x.shape[0], number, dtype=torch.bool, device=x.device)
    for at, block in enumerate(stage.blocks):

        def one(x: Tensor, visible: Tensor, path: Tensor | None, block: Any = block) -> authors.Step:
            return authors.block(block, x, visible, lambda module, branch, which: _drop(module, branch, path, which))

        x, score = _checkpointed(stage, one, x, visible, None if paths is None else paths[at])
        if at in selection.blocks:
            number = int(number * selection.share)
            visible = authors.visible_after(score, visible, number)
            order = torch.sort(visible.int(), dim=1, descending=True, stable=True).indices
            kept[at] = torch.where(visible.gather(1, order), order, -1)
    return Ran(x, kept, score if asked else None)


def _timms(block: Any, x: Tensor, path: Tensor | None) -> Tensor:
    """timm's `forward` of a block on x (B, H, W, D)."""
    before_attention, after_attention, before_mlp, after_mlp = forms.parts_of(block)
    x = x + _drop(block.drop_path1, after_attention(block._attn(before_attention(x))), path, 0)
    flat = x.reshape(x.shape[0], -1, x.shape[3])
    return (flat + _drop(block.drop_path2, after_mlp(block.mlp(before_mlp(flat))), path, 1)).reshape(x.shape)


def _kept(
    block: Any, selection: Selection, at: int, row: bool, x: Tensor, ids: Tensor, path: Tensor | None, rng_keys: Tensor | None
) -> tuple[Tensor, ...]:
    """A block on the kept tokens x (B, k, D) at `ids` (B, k): those that stay and their ids, those that leave and theirs, and the attention
    that tokens received, empty if it was not computed. row: compute it without a selection too."""
    before_attention, after_attention, before_mlp, after_mlp = forms.parts_of(block)
    slots = windows.places(block, x.device)[ids]
    selects = selection.leaves(at, ids.shape[1]) < ids.shape[1]
    scored = row or (selects and selection.score == "received")
    attended = windows.attend(block, before_attention(x), slots, scored)
    received = x.new_empty(0) if attended.received is None else attended.received
    x = x + _drop(block.drop_path1, after_attention(attended.out), path, 0)
    left, left_ids = x[:, :0], ids[:, :0]
    if selects and selection.position == "attention":
        x, ids, left, left_ids = _select(selection, at, x, ids, received, rng_keys)
    x = x + _drop(block.drop_path2, after_mlp(block.mlp(before_mlp(x))), path, 1)
    if selects and selection.position == "block":
        x, ids, left, left_ids = _select(selection, at, x, ids, received, rng_keys)
    return x, ids, left, left_ids, received


def _select(
    selection: Selection, at: int, x: Tensor, ids: Tensor, received: Tensor, rng_keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exactly ceil(k * share) tokens stay, ties by place in the grid; both parts in the order of the grid."""
    if selection.score == "random":
        received = scores.random(Tokens(x, ids, 0, rng_keys=rng_keys), cast(Any, None))
    order, number = scores.ranked(received.detach()), selection.leaves(at, ids.shape[1])
    stay, leave = (part.sort(dim=1).values for part in (order[:, :number], order[:, number:]))
    return windows.take(x, stay), ids.gather(1, stay), windows.take(x, leave), ids.gather(1, leave)


@torch.no_grad()
def _received_of_all(block: Any, x: Tensor) -> Tensor:
    """Attention that each token of x (B, H, W, D) receives in a block, (B, L) float32."""
    slots = windows.places(block, x.device).expand(x.shape[0], -1)
    received = windows.attend(block, forms.parts_of(block)[0](x).flatten(1, 2), slots, scored=True).received
    assert received is not None
    return received


def _checkpointed(stage: Any, one: Any, *given: Any) -> Any:
    return checkpoint(one, *given, use_reentrant=False) if stage.grad_checkpointing else one(*given)


def _drop(path: nn.Module, x: Tensor, drawn: Tensor | None, branch: int) -> Tensor:
    """Drop path of a branch x (B, ...), by timm's module or by the numbers drawn for each image, (2, B, 1, 1)."""
    if drawn is None or not isinstance(path, DropPath) or path.drop_prob == 0.0:
        return path(x)
    return drop_path.dropped(path, x, drawn[branch].view(-1, *(1,) * (x.ndim - 1)))
