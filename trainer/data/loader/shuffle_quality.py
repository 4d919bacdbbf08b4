"""How well an epoch is shuffled, measured: global batches against batches drawn from all kept examples at random."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer.data.order import EpochOrder
from trainer.data.shards.index import Index

_UNEVEN = 1.5  # times a full shuffle's: from here on the line has a remedy


class Quality(NamedTuple):
    """1.0 is a full shuffle; above it the batches are less mixed.

    classes: chi-square of class counts in a batch, over its expectation. shards: the same for the shards the rows come from.
    pairs: share of neighbours (2i, 2i + 1), which mixup pairs, with the same label, over its expectation.
    """

    classes: float
    shards: float
    pairs: float

    def text(self) -> str:
        """One line for the console, with a remedy if classes are spread unevenly."""
        text = (
            f"order: classes in a batch {self.classes:.2f} x as uneven as in a full shuffle, shards {self.shards:.2f} x, mixup partners "
            f"of one class {self.pairs:.2f} x as often"
        )
        remedy = "; raise data.window or data.lanes, or shuffle the shards once (`trilevel pack` does)"
        return text + (remedy if max(self.classes, self.pairs) > _UNEVEN else "")


def runs_of_class(index: Index) -> tuple[float, float]:
    """(share of neighbours in a shard with the same label, the same of a full shuffle); near 1 for shards sorted by class."""
    labels, n = np.asarray(index.labels), len(index)
    inside = np.ones(max(n - 1, 0), dtype=bool)
    borders = index.first[1:-1]
    inside[borders[(borders > 0) & (borders < n)] - 1] = False
    size = np.bincount(labels).astype(float)
    chance = float((size * (size - 1)).sum() / (n * (n - 1.0))) if n > 1 else 1.0
    return float((labels[1:] == labels[:-1])[inside].mean()) if inside.any() else chance, chance


def shuffle_quality(order: EpochOrder, labels: np.ndarray, batches: int = 64) -> Quality:
    """Measure up to `batches` batches spread over the epoch. labels: (N,) int. Expectations are for draws without replacement."""
    layout, label, first = order.layout, np.asarray(labels), order.layout.first
    steps = np.unique(np.linspace(0, order.steps - 1, min(batches, order.steps)).astype(np.int64))
    shown = [order.rows(int(step)) for step in steps]
    rows = np.stack([ids[copies == 0] for ids, copies in shown])  # (batches, b) examples, neighbours still neighbours
    if order.keep is not None:
        kept = np.flatnonzero(np.unpackbits(order.keep, count=int(first[-1]), bitorder="little"))
        by_label = np.bincount(label[kept])
        by_shard = np.bincount(np.searchsorted(first, kept, side="right") - 1, minlength=len(layout.sizes))
    else:
        by_label, by_shard = np.bincount(label), layout.sizes
    b, k = rows.shape[1], max(order.num_kept, 2)

    def uneven(group: np.ndarray, size: np.ndarray) -> float:
        """Chi-square of the counts of each group in a batch over its expectation. group: (batches, b); size: examples of each."""
        present = size > 0
        expected = b * size[present] / k
        counts = np.stack([np.bincount(row, minlength=len(size))[present] for row in group])
        chance = (present.sum() - 1) * (k - b) / (k - 1)
        return float((((counts - expected) ** 2 / expected).sum(1).mean()) / chance) if chance else 1.0

    chance = (by_label * (by_label - 1.0)).sum() / (k * (k - 1.0))
    alike = (label[rows[:, 0 : b // 2 * 2 : 2]] == label[rows[:, 1::2]]).mean()
    shard = np.searchsorted(first, rows, side="right") - 1
    return Quality(uneven(label[rows], by_label), uneven(shard, by_shard), float(alike / chance) if chance else 1.0)
