"""Which of torch's kernels computes an attention. Inside a graph of torch.compile too each attention has its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ORDERS = {first: [BACKENDS[first], *(kind for name, kind in BACKENDS.items() if name != first)] for first in BACKENDS}


class AttentionShape(NamedTuple):
    """An attention of each image: heads, tokens, head width. hides: it has a mask (B, 1, T, T); weighs: a bias for each key, (B, 1, 1, T)
    (ToMe). Flash attention takes neither."""

    heads: int
    tokens: int
    width: int
    hides: bool = False
    weighs: bool = False

    @property
    def masked(self) -> bool:
        return self.hides or self.weighs

    @property
    def kind(self) -> tuple[int, bool]:
        return self.tokens, self.masked


Kernels = Mapping[tuple[int, bool], str]
"""{`AttentionShape.kind`: name of BACKENDS}; torch chooses for a kind that is not there."""
TORCHS_CHOICE: Kernels = {}


def using(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Inside the context torch's attention uses this backend where it can, else the others in the order of BACKENDS. None: torch's choice.
    A graph that torch.compile makes inside keeps it."""
    return contextlib.nullcontext() if name is None else sdpa_kernel(ORDERS[name], set_priority=True)
