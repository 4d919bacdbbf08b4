"""Level 3: which keys later blocks attend to, by method name. A new method is one file and one row in `CONNECTIONS`.

In: tokens (B, T, D) and the attention inputs q, k, v of their block.
Out: the same tokens, with the keys that stay visible.
Never: keeps state between batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsity.connections.exact_mask import ExactMaskSettings
from sparsity.connections.shared_keys import SharedKeysColumnSettings, SharedKeysSettings
from sparsity.settings import ConnectionSettings, Network
from sparsity.types import ConnectAll


@dataclass(frozen=True)
class ConnectAllSettings(ConnectionSettings):
    off: ClassVar[bool] = True

    @property
    def in_reference_code(self) -> bool:
        return True

    def build(self, network: Network) -> ConnectAll:
        return ConnectAll()


CONNECTIONS: dict[str, type[ConnectionSettings]] = {
    "all": ConnectAllSettings,
    "exact": ExactMaskSettings,
    "shared_keys": SharedKeysSettings,
    "shared_keys_column": SharedKeysColumnSettings,
}
