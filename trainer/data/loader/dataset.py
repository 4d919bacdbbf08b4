"""The indexes of a run's data sets, checked against each other and the configuration."""

from __future__ import annotations

from itertools import zip_longest
from typing import Literal

import numpy as np

from trainer.config.schema import DataConfig
from trainer.data.errors import DataError
from trainer.data.remote.cache import Cache, cache_at
from trainer.data.shards.index import Index, open_index


def cache_of(index: Index, data: DataConfig) -> Cache | None:
    """The cache for these shards; None: they are read directly."""
    return cache_at(data.cache, data.cache_size) if index.is_remote() or data.cache else None


def check_labels(index: Index, classes: int) -> None:
    """Raise DataError, naming shard and key, for a label outside the model's classes."""
    wrong = np.flatnonzero((index.labels < 0) | (index.labels >= classes))
    if len(wrong):
        raise DataError(
            f"shard {index.where(int(wrong[0]))}: label {index.labels[wrong[0]]} is outside model.classes={classes} "
            f"({len(wrong)} such images); set model.classes={int(index.labels.max()) + 1} or correct the labels"
        )


def check_classes(train: Index, validation: Index) -> None:
    """Raise DataError if the two have different class names; sets with numbers from 0 instead of names are not compared."""
    named = [index for index in (train, validation) if index.classes != [str(i) for i in range(len(index.classes))]]
    if len(named) < 2 or train.classes == validation.classes:
        return
    pairs = zip_longest(train.classes, validation.classes)
    number, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise DataError(
        f"class {number} is {ours!r} in {train.path} and {theirs!r} in {validation.path}: class names must be equal; put "
        "one classes.txt (a name per line, in order) beside both sets of shards and run `trilevel index` again"
    )


def open_indexes(data: DataConfig, verify: bool = True) -> tuple[Index, Index]:
    """The indexes of training and validation shards, checked against the shards unless `verify` is False."""
    how = data.verify if verify else None
    return opened(data.train, data, how), opened(data.validation, data, how)


def opened(pattern: str, data: DataConfig, verify: Literal["fast", "full"] | None) -> Index:
    """The index of the shards `pattern`, with the labels and index folder of `data`, checked as in `open_index`."""
    return open_index(pattern, data.labels, verify, folder=data.index)
