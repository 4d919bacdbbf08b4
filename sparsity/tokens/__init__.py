"""Level 2: which tokens later blocks compute, by method name. A new method is one file and one row in `TOKENS`.

In: tokens (B, T, D) and the attention inputs q, k, v of their block.
Out: fewer tokens, with the ids of their patches.
Never: keeps state between batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsity.settings import Network, TokenSettings
from sparsity.tokens.tome import MergeSettings
from sparsity.tokens.topk import RandomSettings, TopKSettings
from sparsity.types import KeepAll


@dataclass(frozen=True)
class KeepAllSettings(TokenSettings):
    off: ClassVar[bool] = True

    @property
    def in_reference_code(self) -> bool:
        return True

    def build(self, network: Network) -> KeepAll:
        return KeepAll()


TOKENS: dict[str, type[TokenSettings]] = {
    "all": KeepAllSettings,
    "topk": TopKSettings,
    "random": RandomSettings,
    "tome": MergeSettings,
}
