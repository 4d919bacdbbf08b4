"""Types shared by all levels: tokens and attention inputs of a block, plans, observations of examples, selections.

Letters used in every shape comment: B images, H heads, d head width, D = H * d, n patch tokens now,
p prefix tokens ([CLS], distillation, registers), T = p + n (+ fused tokens), N examples in the data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """The shares that a step keeps, in (0, 1]; 1.0 is dense. A pure function of progress (see `schedule`), so all ranks agree."""

    keep_tokens: float = 1.0
    keep_connections: float = 1.0

    def __post_init__(self) -> None:
        for name in ("keep_tokens", "keep_connections"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise ValueError(f"plan: {name}={value} is outside (0, 1]; it is the share that is kept, 1.0 keeps all")


DENSE = Plan()


@dataclass(frozen=True)
class VisibleKeys:
    """Which keys the following blocks may see: exactly one of the two is set.

    mask: (B, 1, T, T) bool, True = connection kept; the same for all heads.
    index: (B, m) int64 positions in T, prefix included, shared by all queries.
    """

    mask: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch between blocks. Frozen: mechanisms return a new one.

    x: (B, T, D), prefix tokens first. ids: (B, T - p) int64 original patch ids, -1 for a fused token.
    size: (B, T) float32 number of patches merged into each token, or None (all 1). keys: None = all keys visible.
    rng_keys: (B,) int64 key of each image for random choices (see `keyed_random`), or None.
    """

    x: Tensor
    ids: Tensor
    num_prefix: int
    size: Tensor | None = None
    keys: VisibleKeys | None = None
    rng_keys: Tensor | None = None

    def with_(self, **changes: Any) -> Tokens:
        return replace(self, **changes)


class QKV(NamedTuple):
    """The attention inputs of a block: q, k, v, each (B, H, T, d), q and k after qk-norm; `scale` is 1/sqrt(d).

    Scores are computed from it on demand, in float32. attention: (B, T, T) float32, head mean of the map, only if
    the block computed it anyway (`compat: authors`).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    attention: Tensor | None = None


class BlockShape(NamedTuple):
    """The sizes at a mechanism: prefix and patch tokens before it, width D, heads H, head width d."""

    num_prefix: int
    num_patches: int
    width: int
    heads: int
    head_width: int


class Reduce(Protocol):
    """Level 2, at a stated position: "attention" (between the attention residual and the MLP) or "block" (after the MLP).

    Optional attributes, False by default. by_counts: it depends on a plan only by the numbers of patches that it leaves, so
    plans with the same numbers share a compiled graph. weighs: it weights the keys of later blocks.
    """

    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> tuple[Tokens, QKV]: ...

    def count(self, num_patches: int, plan: Plan) -> int:
        """The number of patch tokens after it, fused ones included."""
        ...

    def work(self, shape: BlockShape, plan: Plan) -> int:
        """Multiply-adds of the selection, for one image."""
        ...


class Connect(Protocol):
    """Level 3: sets `Tokens.keys`, the visible keys of the following blocks until the next selection.

    Optional attributes, False by default. by_counts: it depends on a plan only by `num_kept` of the patches. masks: it hides
    keys by a mask.
    """

    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> Tokens: ...

    def visible(self, num_patches: int, plan: Plan) -> int:
        """Patch keys that the following blocks compute with (a mask hides keys, but computes them)."""
        ...

    def work(self, shape: BlockShape, plan: Plan) -> int:
        """Multiply-adds of the selection, for one image."""
        ...


class ModelOutput(NamedTuple):
    """Output of a model. Fields beside the logits are None unless named in `outputs`.

    logits: (B, classes), or a pair for distilled models in training. cls_attention: (B, n_last) float32 head mean of
    the last block's [CLS] row over patches. importance: (B, n) float32 token importance at the requested block.
    kept: original patch ids that survive each pruning block, {block: (B, k) int64}.
    keys: the visible keys after each pruning block, {block: VisibleKeys}.
    """

    logits: Any
    cls_attention: Tensor | None = None
    importance: Tensor | None = None
    kept: dict[int, Tensor] | None = None
    keys: dict[int, VisibleKeys] | None = None


class Observation(NamedTuple):
    """One step's observations of the examples of this rank, all (b,) and on the device.

    correct: bool, right under the chosen rule. loss: float32, unweighted. spread: float32, variance of the last
    block's [CLS] attention times n^2 (0 if not requested). valid: bool, False for padding, broken images and every
    copy of an image but the first. clear: bool, whether `correct` counts (the result of a mixed image may be uncertain), None: all.
    """

    correct: Tensor
    loss: Tensor
    spread: Tensor
    valid: Tensor
    clear: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """The examples of an epoch, equal on all ranks. keep: (ceil(N / 8),) uint8, np.packbits(..., bitorder="little").

    weight: (N,) float32 loss weight per example, or None (all 1). facts: numbers and short texts for the journal.
    """

    keep: np.ndarray
    num_kept: int
    weight: np.ndarray | None
    facts: dict[str, Any]


Gather = Callable[[Tensor], Tensor]
"""Concatenates a tensor along dimension 0 over all ranks, in rank order; lengths may differ. Identity on one rank."""


class Examples(Protocol):
    """Level 1: which examples an epoch shows. `state_dict` holds the complete state, independent of the world size."""

    wants_spread: bool

    def uses_observations(self, epoch: int) -> bool:
        """Whether observations of `epoch` may change a later selection."""
        ...

    def allocate(self, device: torch.device) -> None:
        """Make what `observe` writes to; else it does so itself when it is first called."""
        ...

    def observe(self, ids: Tensor, observation: Observation) -> None:
        """Called every step, or after an epoch with the rows of a probe; on the device, without a host sync. ids: (b,) int64, the
        example that each row is credited to."""
        ...

    def select(self, epoch: int, gather: Gather) -> Selection:
        """At the start of an epoch, collective; returns the same Selection on all ranks."""
        ...

    def state_dict(self, gather: Gather) -> dict[str, np.ndarray]: ...

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None: ...


def single_process(tensor: torch.Tensor) -> torch.Tensor:
    """The `Gather` of a single process."""
    return tensor


@dataclass(frozen=True)
class ConnectAll:
    """The identity: all keys visible."""

    by_counts: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> Tokens:
        return tokens

    def visible(self, num_patches: int, plan: Plan) -> int:
        return num_patches

    def work(self, shape: BlockShape, plan: Plan) -> int:
        return 0


def num_kept(num: int, share: float) -> int:
    """ceil(num * share): how many of `num` are kept, at least one for share > 0. In float64 as in the reference code: .55 of 100 is 56."""
    return math.ceil(num * share)


@dataclass(frozen=True)
class KeepAll:
    """The identity."""

    by_counts: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, qkv: QKV, plan: Plan) -> tuple[Tokens, QKV]:
        return tokens, qkv

    def count(self, num_patches: int, plan: Plan) -> int:
        return num_patches

    def work(self, shape: BlockShape, plan: Plan) -> int:
        return 0
