"""Shares of classes, for balanced methods: quotas, the first ids of each group, keep ratios. Numpy arrays, no state.

A group is a class if the method is balanced, else there is one group.
"""

from __future__ import annotations

import numpy as np


def quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` (at most the sum of sizes) divided in proportion to `sizes` (G,), largest remainder first; none above its size. (G,) int64"""
    sizes = sizes.astype(np.int64)
    total = min(total, int(sizes.sum()))
    whole, rest = np.divmod(sizes * total, max(int(sizes.sum()), 1))
    missing = total - int(whole.sum())
    whole[np.lexsort((np.arange(len(sizes)), -rest))[:missing]] += 1
    return whole


def first_per_group(ids: np.ndarray, group: np.ndarray, quota: np.ndarray, skip: int = 0) -> np.ndarray:
    """The first quota[g] of each group g in the order of `ids` (n,); with `skip`, the skip-th such part, cyclically."""
    of = group[ids]
    by = np.argsort(of, kind="stable")
    ids, of = ids[by], of[by]
    sizes = np.bincount(of, minlength=len(quota))
    rank = np.arange(len(ids)) - (np.cumsum(sizes) - sizes)[of]
    if skip:
        rank = (rank - skip * quota[of]) % sizes[of]
    return ids[rank < quota[of]]


def keep_rates(keep: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of each class that is kept, (C,) float64; NaN for a class without examples. keep: (N,) bool."""
    sizes = np.bincount(labels)
    kept = np.bincount(labels[keep], minlength=len(sizes))
    return np.divide(kept, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)
