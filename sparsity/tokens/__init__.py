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
from sparsity.types import KeepAll, MechanismOptions, Reduce

TOKENS: dict[str, Callable[[MechanismOptions], Reduce]] = {
    "all": lambda options: KeepAll(),
    "topk": lambda options: TopK(
        scores.cls_row if options.has_class_token else scores.received, options.fuse, options.carry_qkv, options.authors
    ),
    "random": lambda options: TopK(scores.random, options.fuse, options.carry_qkv),
    "tome": lambda options: Merge(options.merged, options.carry_qkv),
}
