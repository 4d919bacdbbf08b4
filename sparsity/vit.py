"""A timm VisionTransformer with the mechanisms of levels 2 and 3, by composition: no patching, and the weights keep their names.

With everything kept it is timm's forward pass bit for bit (eager float32: logits and gradients, seeded training with drop path,
gradient checkpointing). Letters as in `types`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsity import attention, drop_path, keyed_random, patch_drop, vit_support
from sparsity import cost as counted
from sparsity.attention_kernel import AttentionShape
from sparsity.graph_cost import embed_work
from sparsity.network import NOTHING_LEFT_OUT, Cost, Levels, SparseNetwork
from sparsity.tokens import scores
from sparsity.types import DENSE, Connect, ConnectAll, KeepAll, ModelOutput, Plan, Reduce, Tokens, VisibleKeys, num_kept
from sparsity.vit_parts import NOTHING, Wanted, added, parts_of


class SparseViT(SparseNetwork):
    """`vit` with token reduction and connections in `blocks` (counted from 0).

    position: where tokens are dropped, "attention" (before the MLP of the block) or "block" (after it). importance: name of the score
    of tokens. Raises ValueError, naming it, for a network whose forward pass it cannot reproduce.
    """

    models = "vit_* and deit* (timm's VisionTransformer)"
    gives = frozenset({"cls_attention", "importance", "kept", "keys"})
    prunes_weights = True
    has_residual = True

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        reduce: Reduce = KeepAll(),  # noqa: B008 (frozen)
        connect: Connect = ConnectAll(),  # noqa: B008 (frozen)
        blocks: Collection[int] = (),
        position: str = "attention",
        attend: attention.Attend = attention.fused,
        importance: str = "default",
    ) -> None:
        super().__init__(vit)
        vit_support.refuse(vit)
        outside = [b for b in blocks if not 0 <= b < len(vit.blocks)]
        if outside:
            raise ValueError(f"blocks={outside}: this network has blocks 0 to {len(vit.blocks) - 1}")
        if position not in ("attention", "block"):
            raise ValueError(
                f"position={position!r}: unknown value; valid values: attention (before the MLP), block (after it)"
            )
        self.embed_work = embed_work(vit.patch_embed)
        self.reduce, self.connect, self.attend = reduce, connect, attend
        self.blocks, self.position = frozenset(blocks), position
        self.about = vit_support.about(vit, position)
        self.importance = self.about.importance(importance)

    def attention_shapes(self, plan: Plan = DENSE) -> tuple[AttentionShape, ...]:
        attentions, tokens = [block.attn for block in self.network.blocks], self.cost(plan).tokens
        hides = getattr(self.connect, "masks", False) and plan.keep_connections < 1.0
        after = min(self.blocks, default=len(attentions))  # the first block that merges or hides
        return tuple(
            AttentionShape(
                a.num_heads,
                n,
                a.head_dim,
                hides and number > after,
                n < tokens[0] and number > after and getattr(self.reduce, "weighs", False),
            )
            for number, (a, n) in enumerate(zip(attentions, tokens, strict=True))
        )

    def counts(self, plan: Plan) -> Any:
        varies = (
            not isinstance(self.vit.patch_drop, nn.Identity) or self.vit.dynamic_img_size
        )  # then there are not always `cost`'s patches
        if varies or not (getattr(self.reduce, "by_counts", False) and getattr(self.connect, "by_counts", False)):
            return plan
        cost, prefix = self.cost(plan), self.vit.num_prefix_tokens
        tokens = (*cost.tokens, cost.left)
        connect = (
            ()
            if not self.connects
            else tuple(num_kept(tokens[b + 1] - prefix, plan.keep_connections) for b in sorted(self.blocks))
        )
        return tokens, connect

    @classmethod
    def why_not(cls, network: nn.Module) -> str:
        return vit_support.text_of(vit_support.refuse, network)

    @classmethod
    def uncounted(cls, network: nn.Module) -> str:
        return vit_support.text_of(counted.refuse, network)

    @classmethod
    def of(cls, network: nn.Module, levels: Levels) -> Self:
        vit, off, authors = cast(VisionTransformer, network), levels.off, levels.compat == "authors"
        vit_support.refuse(vit)
        if not off:
            vit_support.refuse_blocks(levels.blocks, len(vit.blocks), levels.position)
        if authors:
            vit_support.refuse_compat(vit, levels)
        about = vit_support.about(vit, levels.position)._replace(carry_qkv=not levels.connections.off, authors=authors)
        return cls(
            vit,
            reduce=levels.tokens.build(about),
            connect=levels.connections.build(about),
            blocks=() if off else levels.blocks,
            position=levels.position,
            attend=attention.authors if authors else attention.fused,
            importance=levels.tokens.importance_in(about),
        )

    @property
    def vit(self) -> VisionTransformer:
        """The timm network."""
        return self.network

    def forward(
        self, images: Tensor, plan: Plan = DENSE, outputs: frozenset[str] = frozenset(), rng_keys: Tensor | None = None
    ) -> ModelOutput:
        """As `SparseNetwork`. outputs: "cls_attention", "importance:<block>", "kept", "keys". rng_keys: patch drop depends on them too."""
        wanted = Wanted.parse(outputs, len(self.vit.blocks))
        tokens = self._embedded(images, rng_keys)
        paths = None
        if rng_keys is not None and self.vit.training:
            drawn = keyed_random.uniform(rng_keys, drop_path.SALT, shape=(len(self.vit.blocks), 2))  # (B, L, 2)
            paths = drawn.movedim(0, 2)[..., None, None].unbind()  # per block (2, B, 1, 1): views, no kernels in the blocks
        kept, keys, cls_attention, importance = {}, {}, None, None
        for number in range(len(self.vit.blocks)):
            tokens, row, ranks = self._run(number, tokens, plan, wanted, None if paths is None else paths[number])
            cls_attention = cls_attention if row is None else row
            importance = importance if ranks is None else ranks
            if number in self.blocks:
                kept[number] = tokens.ids
                if tokens.keys is not None:
                    keys[number] = tokens.keys
        logits = self.vit.forward_head(self.vit.norm(tokens.x))
        return ModelOutput(logits, cls_attention, importance, kept if wanted.kept else None, keys if wanted.keys else None)

    def until(self, last: int, images: Tensor) -> tuple[Tokens, Tensor]:
        """All tokens after block `last`, and the importance of its patches, (B, n) float32, with nothing dropped. For inference with
        another number of tokens per image (`adaptive`)."""
        tokens = self.blocks_from(range(last), self._embedded(images, None))
        block = cast(Block, self.vit.blocks[last])
        before_attention, after_attention, before_mlp, after_mlp = parts_of(block)
        attended, qkv = self.attend(block.attn, before_attention(tokens.x), tokens, self.kernels)
        importance = scores.importance(tokens, qkv, self.importance)
        del qkv
        x = added(tokens.x, block.drop_path1(after_attention(attended)))
        return tokens.with_(x=added(x, block.drop_path2(after_mlp(block.mlp(before_mlp(x)))))), importance

    def blocks_from(self, numbers: range, tokens: Tokens) -> Tokens:
        """The blocks `numbers` over tokens, under the plan that keeps everything."""
        for number in numbers:
            tokens, _, _ = self._block(number, tokens, DENSE, NOTHING, None)
        return tokens

    @property
    def connects(self) -> bool:
        """Whether level 3 is on."""
        return not isinstance(self.connect, ConnectAll)

    def cost(self, plan: Plan = DENSE, left: Mapping[str, float] = NOTHING_LEFT_OUT) -> Cost:
        return counted.cost(counted.shape_of(self, left), plan)

    def dense(self) -> SparseViT:
        """Itself, unless its attention is not timm's (`compat: authors`), which is slower."""
        if self.attend is attention.fused:
            return self
        found = SparseViT(self.vit)
        found.kernels = self.kernels
        return found

    @property
    def grid(self) -> tuple[int, int]:
        return self.vit.patch_embed.grid_size

    def _embedded(self, images: Tensor, rng_keys: Tensor | None) -> Tokens:
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(images))
        p = vit.num_prefix_tokens
        x, ids = patch_drop.dropped(vit.patch_drop, x, p, rng_keys)
        x = vit.norm_pre(x)
        narrow = self.residual is not None and torch.is_autocast_enabled(
            x.device.type
        )  # else float32 products would meet bf16 tokens
        return Tokens(x.to(self.residual) if narrow else x, ids, p, rng_keys=rng_keys)

    def _run(self, number: int, tokens: Tokens, plan: Plan, wanted: Wanted, path: Tensor | None) -> tuple[Tokens, Any, Any]:
        """One block, under gradient checkpointing if enabled; checkpoint() finds the devices' generators only in flat arguments."""

        def flat(x: Tensor, ids: Tensor, size: Any, mask: Any, index: Any, rng_keys: Any, path: Any) -> tuple[Any, ...]:
            keys = None if mask is None and index is None else VisibleKeys(mask, index)
            after, row, ranks = self._block(number, Tokens(x, ids, tokens.num_prefix, size, keys, rng_keys), plan, wanted, path)
            keys = after.keys or VisibleKeys()
            return after.x, after.ids, after.size, keys.mask, keys.index, row, ranks

        keys = tokens.keys or VisibleKeys()
        given = (tokens.x, tokens.ids, tokens.size, keys.mask, keys.index, tokens.rng_keys, path)
        if self.vit.grad_checkpointing:
            x, ids, size, mask, index, row, ranks = cast(tuple, checkpoint(flat, *given, use_reentrant=False))
        else:
            x, ids, size, mask, index, row, ranks = flat(*given)
        keys = None if mask is None and index is None else VisibleKeys(mask, index)
        return tokens.with_(x=x, ids=ids, size=size, keys=keys), row, ranks

    def _block(self, number: int, tokens: Tokens, plan: Plan, wanted: Wanted, path: Tensor | None) -> tuple[Tokens, Any, Any]:
        block = cast(Block, self.vit.blocks[number])
        before_attention, after_attention, before_mlp, after_mlp = parts_of(block)
        attended, qkv = self.attend(block.attn, before_attention(tokens.x), tokens, self.kernels)
        row, ranks = None, scores.importance(tokens, qkv, self.importance) if wanted.importance == number else None
        if wanted.cls_attention and number == len(self.vit.blocks) - 1:
            with torch.no_grad():
                row = self.look_back(tokens, qkv)
        tokens = tokens.with_(x=added(tokens.x, drop_path.of_branch(block.drop_path1, after_attention(attended), path, 0)))
        carried = qkv if number in self.blocks else None
        del attended, qkv  # a quarter of the memory of a pass, which the MLP would hold else
        if carried is not None and self.position == "attention":
            tokens, carried = self.reduce(tokens, carried, plan)
        branch = after_mlp(block.mlp(before_mlp(tokens.x)))
        tokens = tokens.with_(x=added(tokens.x, drop_path.of_branch(block.drop_path2, branch, path, 1)))
        if carried is not None and self.position == "block":
            tokens, carried = self.reduce(tokens, carried, plan)
        if carried is not None:
            tokens = self.connect(tokens, carried, plan)
        return tokens, row, ranks

    @property
    def look_back(self) -> scores.Score:
        """The score for the last block's attention: its [CLS] row, or without [CLS] the attention that patches receive."""
        return scores.cls_row if self.vit.has_class_token else scores.received
