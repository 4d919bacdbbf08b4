"""Level 3: which keys later blocks attend to, by method name. A new method is one file and one row in `CONNECTIONS`.

In: tokens (B, T, D) and the attention inputs q, k, v of their block.
Out: the same tokens, with the keys that stay visible.
Never: keeps state between batches.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsity.connections.exact_mask import ExactMask
from sparsity.connections.shared_keys import SharedKeys
from sparsity.types import Connect, ConnectAll, Wish

CONNECTIONS: dict[str, Callable[[Wish], Connect]] = {
    "all": lambda wish: ConnectAll(),
    "exact": lambda wish: ExactMask(wish.authors),
    "shared_keys": lambda wish: SharedKeys("cls"),
    "shared_keys_column": lambda wish: SharedKeys("column"),
}
