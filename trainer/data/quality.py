"""How well an epoch is shuffled, measured: global batches against batches drawn from all kept examples at random."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer.data.order import EpochOrder


class Quality(NamedTuple):
    """1.0 is a full shuffle; above it the batches are less mixed.

    classes: chi-square of class counts in a batch, over its expectation. shards: the same for the shards the rows come from.
    pairs: share of neighbours (2i, 2i + 1), which mixup pairs, with the same label, over its expectation.
    """

    classes: float
    shards: float
    pairs: float


def shuffle_quality(order: EpochOrder, labels: np.ndarray, batches: int = 64) -> Quality:
    """Measure up to `batches` batches spread over the epoch. labels: (N,) int. Expectations are of draws without return."""
    layout, num_examples = order.layout, int(order.layout.first[-1])
    steps = np.unique(np.linspace(0, order.steps - 1, min(batches, order.steps)).astype(np.int64))
    shown = [order.rows(int(step)) for step in steps]
    rows = np.stack([ids[copies == 0] for ids, copies in shown])  # (batches, b) examples, neighbours still neighbours
    if order.keep is None:
        kept = np.arange(num_examples)
    else:
        kept = np.flatnonzero(np.unpackbits(order.keep, count=num_examples, bitorder="little"))
    label, shard = np.asarray(labels), np.repeat(np.arange(len(layout.sizes)), layout.sizes)
    b, k = rows.shape[1], max(len(kept), 2)

    def uneven(group: np.ndarray) -> float:
        """Chi-square of the counts of each group in a batch over its expectation."""
        size = np.bincount(group[kept])
        present = size > 0
        expected = b * size[present] / k
        counts = np.stack([np.bincount(group[row], minlength=len(size))[present] for row in rows])
        chance = (present.sum() - 1) * (k - b) / (k - 1)
        return float((((counts - expected) ** 2 / expected).sum(1).mean()) / chance) if chance else 1.0

    size = np.bincount(label[kept])
    chance = (size * (size - 1.0)).sum() / (k * (k - 1.0))
    alike = (label[rows[:, 0 : b // 2 * 2 : 2]] == label[rows[:, 1::2]]).mean()
    return Quality(uneven(label), uneven(shard), float(alike / chance) if chance else 1.0)
