"""Level 3: which keys later blocks attend to, by method name. A new method is one file and one row in `CONNECTIONS`.

In: tokens (B, T, D) and the attention inputs q, k, v of their block.
Out: the same tokens, with the keys that stay visible.
Never: keeps state between batches.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsity.connections.exact_mask import ExactMask
from sparsity.connections.shared_keys import SharedKeys
from sparsity.types import Connect, ConnectAll, MechanismOptions

CONNECTIONS: dict[str, Callable[[MechanismOptions], Connect]] = {
    "all": lambda options: ConnectAll(),
    "exact": lambda options: ExactMask(options.authors),
    "shared_keys": lambda options: SharedKeys("cls"),
    "shared_keys_column": lambda options: SharedKeys("column"),
}
