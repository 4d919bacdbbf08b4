"""Level 2: which tokens later blocks compute, by method name. A new method is one file and one row in `TOKENS`.

In: tokens (B, T, D) and the attention inputs q, k, v of their block.
Out: fewer tokens, with the ids of their patches.
Never: keeps state between batches.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsity.tokens import scores
from sparsity.tokens.tome import Merge
from sparsity.tokens.topk import TopK
from sparsity.types import KeepAll, Reduce, Wish

TOKENS: dict[str, Callable[[Wish], Reduce]] = {
    "all": lambda wish: KeepAll(),
    "topk": lambda wish: TopK(
        scores.cls_row if wish.has_class_token else scores.received, wish.fuse, wish.carry_seen, wish.authors
    ),
    "random": lambda wish: TopK(scores.random, wish.fuse, wish.carry_seen),
    "tome": lambda wish: Merge(wish.merged, wish.carry_seen),
}
