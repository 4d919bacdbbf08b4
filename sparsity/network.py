"""What the training loop calls, whatever the network: a timm classifier with the levels that its family supports.

A family is a subclass of `SparseNetwork` in one file and a row of `FAMILIES` in `build`. Above `sparsity`, `forward`, `cost`, `dense`,
`blocks` and `grid` are used, and the timm network itself for its weights; nothing asks which family it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch._dynamo
from torch import Tensor, nn

from sparsity.attention_kernel import TORCHS_CHOICE, AttentionShape, Kernels
from sparsity.settings import ConnectionSettings, TokenSettings
from sparsity.types import DENSE, ModelOutput, Plan

NUM_GRAPHS = 128  # plans of a run x training and evaluation x weights and their average
NOTHING_LEFT_OUT: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Levels:
    """What a run wants of levels 2 and 3. blocks: that select, counted from 0. position: "attention" (before the MLP) or "block" (after
    it). image_size: side in pixels; None: that of timm's weights."""

    tokens: TokenSettings
    connections: ConnectionSettings
    blocks: tuple[int, ...] = ()
    position: str = "attention"
    compat: str = "none"
    image_size: int | None = None

    @property
    def off(self) -> bool:
        return self.tokens.off and self.connections.off


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image: total, and of each block.

    tokens: input tokens (with prefix) of each block's attention; () for a network without tokens. left: tokens after the last block.
    """

    total: int
    per_block: tuple[int, ...]
    tokens: tuple[int, ...]
    left: int


class SparseNetwork(nn.Module):
    """`network`, a timm classifier, with token reduction and connections in `blocks`. With everything kept it is timm's forward pass
    bit for bit.

    models: timm names of the family, for messages. gives: its outputs beside logits, see `ModelOutput`. prunes_weights: whether level 4
    knows its layers. has_residual: whether it keeps its tokens in `residual`.
    """

    models: ClassVar[str]
    gives: ClassVar[frozenset[str]] = frozenset()
    prunes_weights: ClassVar[bool] = False
    has_residual: ClassVar[bool] = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.blocks: frozenset[int] = frozenset()
        self.importance = ""  # name of the score of its tokens (`Network.importance`); "" without one
        self.residual: torch.dtype | None = None  # of the tokens between blocks, under autocast; None: float32, as timm
        self.kernels: Kernels = TORCHS_CHOICE  # of its attention
        self._plans: dict[Any, Plan] = {}  # by `counts` the first plan with them, and that by plan
        self.training = network.training

    @classmethod
    @abstractmethod
    def why_not(cls, network: nn.Module) -> str:
        """Why this family cannot run `network`, as text that names the part; "" if it can."""

    @classmethod
    def uncounted(cls, network: nn.Module) -> str:
        """Why the multiply-adds of `network` are unknown to this family, as text that names the part; "" if they are not."""
        return ""

    @classmethod
    @abstractmethod
    def of(cls, network: nn.Module, levels: Levels) -> Self:
        """The network with its mechanisms. Raises ValueError, with the key to change, for settings that it does not support."""

    @abstractmethod
    def forward(
        self, images: Tensor, plan: Plan = DENSE, outputs: frozenset[str] = frozenset(), rng_keys: Tensor | None = None
    ) -> ModelOutput:
        """images (B, 3, height, width) float -> ModelOutput, under a plan.

        outputs: names of fields beside the logits. rng_keys: (B,) int64, the key of each image: drop path then depends on it alone, not
        on rank or batch mates. None: timm's modules draw from the global generator, as in timm. Dropout (timm's *_drop_rate) always does.
        """

    @abstractmethod
    def cost(self, plan: Plan = DENSE, left: Mapping[str, float] = NOTHING_LEFT_OUT) -> Cost:
        """Multiply-adds of one image's forward pass at the network's own image size. left: shares of pruned layers, see `cost`."""

    def dense(self) -> SparseNetwork:
        """A network with the same weights that keeps everything, in timm's own form: the baseline of timed passes. Itself if it is that."""
        return self

    def attention_shapes(self, plan: Plan = DENSE) -> tuple[AttentionShape, ...]:
        """Each block's attention over all of its tokens; () for a family that has none of that form."""
        return ()

    def counts(self, plan: Plan) -> Any:
        """What of `plan` a forward pass depends on: the numbers of tokens and keys. The plan itself where it may depend on more."""
        return plan

    def __call__(self, images: Tensor, plan: Plan = DENSE, *args: Any, **named: Any) -> ModelOutput:
        """Compiled, under the first plan with the same `counts`: its shares are constants of a graph, and others would be another graph."""
        if self._compiled_call_impl is not None and not torch.compiler.is_compiling():
            if plan not in self._plans:  # counting takes .4 ms for DeiT-S
                self._plans[plan] = self._plans.setdefault(self.counts(plan), plan)
            plan = self._plans[plan]
        return super().__call__(images, plan, *args, **named)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens down and across that the ids in `kept` count, in reading order. Raises ValueError for a network without them."""
        raise ValueError(f"{type(self.network).__name__} has no tokens to select")

    def compile(self, *args: Any, **settings: Any) -> None:
        """`nn.Module.compile`, in place, with shapes fixed in each graph: one graph per `counts` of a plan, never one with symbolic counts.

        A graph is reused when its plan comes again; up to NUM_GRAPHS are kept (torch's default limit is 8).
        """
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, NUM_GRAPHS)
        super().compile(*args, **({"dynamic": False} | settings))
