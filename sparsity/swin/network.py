"""A timm SwinTransformer or SwinTransformerV2 with token selection in one stage (level 2): the tokens that are left out of a block are not
computed there, and have their old value again where the next stage merges patches (docs/methods.md, section Swin).

With everything kept it is timm's forward pass bit for bit. Letters as in `windows`; blocks are counted over all stages, from 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self, cast

import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from sparsity import drop_path
from sparsity.network import NOTHING_LEFT_OUT, Cost, Levels, SparseNetwork
from sparsity.swin import stage as stages
from sparsity.swin.cost import cost
from sparsity.swin.forms import FORMS
from sparsity.swin.stage import Selection
from sparsity.tokens import TOKENS
from sparsity.types import DENSE, ModelOutput, Plan, num_kept


class SparseSwin(SparseNetwork):
    """`swin` with token selection in `blocks` of one stage. score: "received" or "random", see `TokenSettings.windowed`. position: "block"
    (after the block, as the authors) or "attention" (before its MLP). authors: the form of the reference code, which saves nothing."""

    models = "swin_* or swinv2_*, not swinv2_cr_* (timm's SwinTransformer and SwinTransformerV2)"
    gives = frozenset({"cls_attention", "kept", "keys"})

    def __init__(
        self, swin: SwinTransformer | SwinTransformerV2, *, score: str = "received", blocks: Collection[int] = (), position: str = "block",
        authors: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(swin)
        if position not in ("attention", "block"):
            raise ValueError(
                f"position={position!r}: unknown value; valid values: attention (before the MLP), block (after it)"
            )
        self.score, self.position, self.authors = score, position, authors
        self.blocks = frozenset(blocks)
        self._depths = [len(stage.blocks) for stage in self.network.layers]
        self._stage, self._first = _stage_of(min(blocks, default=0), self._depths)

    @classmethod
    def why_not(cls, network: nn.Module) -> str:
        kind = type(network).__name__
        if type(network) not in FORMS:
            return f"{kind} is not timm's {' or '.join(known.__name__ for known in FORMS)}"
        block, attention = FORMS[type(network)]
        if not network.global_pool:
            return f"a {kind} with global_pool='' returns tokens, not logits"
        if network.dynamic_img_size:
            return f"dynamic_img_size changes the windows of a {kind}"
        for number, own in enumerate(own for stage in cast(Any, network).layers for own in stage.blocks):
            wanted = {own: block, own.attn: attention}
            if wrong := next(((part, kind) for part, kind in wanted.items() if type(part) is not kind), None):
                return f"block {number} has a {type(wrong[0]).__name__}; only timm's {wrong[1].__name__} is supported"
            for path in (own.drop_path1, own.drop_path2):
                if type(path) not in (DropPath, nn.Identity):
                    return f"the drop path of block {number} is a {type(path).__name__}; only timm's DropPath is supported"
        return ""

    @classmethod
    def of(cls, network: nn.Module, levels: Levels) -> Self:
        swin, authors = cast(SwinTransformer, network), levels.compat == "authors"
        _refuse_levels(levels)
        if levels.tokens.off:
            return cls(swin, authors=False)
        _refuse_blocks(levels.blocks, [len(cast(Any, stage).blocks) for stage in swin.layers])
        if authors and type(swin) is not SwinTransformer:
            raise ValueError(
                "compat=authors: the reference code has no SwinTransformerV2; choose a network of swin_*, or set compat=none"
            )
        if authors and (levels.position != "block" or levels.tokens.windowed != "received"):
            raise ValueError(
                "compat=authors with a SwinTransformer: the reference code selects after the block by received attention; set "
                "tokens.method=topk, tokens.position=block, or compat=none"
            )
        return cls(swin, score=levels.tokens.windowed, blocks=levels.blocks, position=levels.position, authors=authors)

    @property
    def grid(self) -> tuple[int, int]:
        return self.network.layers[self._stage].output_resolution

    def dense(self) -> SparseNetwork:
        return SparseSwin(self.network) if self.authors else self

    def forward(
        self, images: Tensor, plan: Plan = DENSE, outputs: frozenset[str] = frozenset(), rng_keys: Tensor | None = None
    ) -> ModelOutput:
        """As `SparseNetwork`. outputs: "cls_attention" (the attention that tokens of the last block receive), "kept", and "keys", which is
        empty: no key is hidden by choice."""
        if unknown := outputs - self.gives:
            raise ValueError(
                f"outputs={', '.join(sorted(unknown))}: unknown value; valid values: {', '.join(sorted(self.gives))}"
            )
        swin, paths, selection = self.network, None, self._selection(plan)
        if rng_keys is not None and swin.training:
            drawn = drop_path.draw(rng_keys, 2 * sum(self._depths)).view(images.shape[0], -1, 2)
            paths = drawn.movedim(0, 2)[..., None, None].unbind()  # per block (2, B, 1, 1)
        x, ran, first = swin.patch_embed(images), None, 0
        kept: dict[int, Tensor] = {}
        for index, stage in enumerate(swin.layers):
            asked = "cls_attention" in outputs and index == len(self._depths) - 1
            own = None if paths is None else paths[first : first + len(stage.blocks)]
            x = stage.downsample(x)
            if index != self._stage or selection is None:
                ran = stages.whole(stage, x, own, asked)
            elif self.authors:
                ran = stages.as_authors(stage, x, selection, own, asked)
            else:
                ran = stages.selecting(stage, x, selection, own, rng_keys, asked)
            x, first = ran.x, first + len(stage.blocks)
            kept |= {self._first + block: ids for block, ids in ran.kept.items()}
        if self.blocks and not kept:
            everything = torch.arange(self._num_tokens, device=images.device).expand(images.shape[0], -1)
            kept = dict.fromkeys(sorted(self.blocks), everything)
        logits = swin.forward_head(swin.norm(x))
        received = None if ran is None else ran.received
        return ModelOutput(logits, received, None, kept if "kept" in outputs else None, {} if "keys" in outputs else None)

    def cost(self, plan: Plan = DENSE, left: Mapping[str, float] = NOTHING_LEFT_OUT) -> Cost:
        selection, kept, in_mlp, now = self._selection(plan), {}, {}, self._num_tokens
        if selection is not None and not self.authors:
            for at in range(min(selection.blocks), self._depths[self._stage]):
                number, after = self._first + at, selection.leaves(at, now)
                kept[number], in_mlp[number] = now, after if self.position == "attention" else now
                now = after
        return cost(self.network, kept, in_mlp)

    @property
    def _num_tokens(self) -> int:
        """Of the stage that selects."""
        return self.grid[0] * self.grid[1]

    def _selection(self, plan: Plan) -> Selection | None:
        """What the stage selects under a plan; None if it keeps everything. The authors hide a token even then."""
        if not self.blocks or not (self.authors or num_kept(self._num_tokens, plan.keep_tokens) < self._num_tokens):
            return None
        return Selection(frozenset(n - self._first for n in self.blocks), plan.keep_tokens, self.score, self.position)


def _stage_of(block: int, depths: list[int]) -> tuple[int, int]:
    """The stage of a block, and the number of its first one."""
    first = 0
    for stage, depth in enumerate(depths):
        if block < first + depth:
            return stage, first
        first += depth
    raise ValueError(f"tokens.blocks: this network has blocks 0 to {first - 1}")


def _refuse_levels(levels: Levels) -> None:
    """Raises ValueError for methods that need attention between all tokens."""
    if not levels.connections.off:
        raise ValueError(
            "connections: a SwinTransformer has no level 3, its windows have few keys; set connections.method=all, or choose a vit_* or "
            "deit* model"
        )
    if not levels.tokens.off and not levels.tokens.windowed:
        name = next((name for name, kind in TOKENS.items() if kind is type(levels.tokens)), type(levels.tokens).__name__)
        able = "|".join(name for name, kind in TOKENS.items() if kind().windowed)
        raise ValueError(
            f"tokens.method={name} with a SwinTransformer: it needs attention between all tokens, [CLS] or fused tokens, which windows do "
            f"not have; set tokens.method={able} with tokens.importance=received and tokens.fuse=false"
        )


def _refuse_blocks(blocks: Collection[int], depths: list[int]) -> None:
    if not blocks:
        raise ValueError("tokens.blocks=[]: no block selects tokens; name the blocks")
    if min(blocks) < 0 or max(blocks) >= sum(depths):
        raise ValueError(f"tokens.blocks={list(blocks)}: this network has blocks 0 to {sum(depths) - 1}; change tokens.blocks")
    stage, first = _stage_of(min(blocks), depths)
    if max(blocks) < first + depths[stage] - 1:
        return
    ends = [sum(depths[: number + 1]) for number in range(len(depths))]
    able = [
        f"{end - depth} to {end - 2} (stage {number})"
        for number, (depth, end) in enumerate(zip(depths, ends, strict=True), 1)
        if depth > 1
    ]
    text = (
        f"tokens.blocks={list(blocks)}: all must be in one stage and before its last block, because all tokens come back where the next "
        f"stage merges patches; blocks of this network that can select: {', '.join(able) or 'none'}"
    )
    if len(depths) > 2 and depths[2] > 4:
        text += f"; the authors select in {[ends[1] + number for number in (1, 2, 3)]}"
    raise ValueError(text)
