"""Class numbers that count from 1: found by their gap at 0, because they would train an empty class."""

from __future__ import annotations

import numpy as np

from trainer.data.shards.index import Index


def numbered(index: Index) -> bool:
    """Whether the classes have numbers for names."""
    return index.classes == [str(i) for i in range(len(index.classes))]


def counts_from_one(index: Index) -> bool:
    """Whether the labels are the numbers 1 to n without a gap, so that class 0 would be empty."""
    if not numbered(index) or len(index) == 0 or index.labels.min() != 1:
        return False
    return len(np.unique(index.labels)) == index.labels.max() > 1


def renumber(index: Index) -> str:
    """What to do about labels that `counts_from_one` finds, as text."""
    most = int(index.labels.max())
    return (
        f"labels are the numbers 1 to {most}, and none is 0; if they count from 1, put a classes.txt with the lines 1 to {most} beside "
        "the shards, in place of one that is there; if class 0 has no image here, one with the names of all classes, that of class 0 "
        "first; then run `trilevel index` again"
    )
