"""The indexes of a run's data sets, checked against each other and the configuration."""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal

import numpy as np

from trainer.config.schema import DataConfig
from trainer.data.errors import DataError
from trainer.data.remote.cache import Cache, cache_at
from trainer.data.shards.index import Index, open_index
from trainer.data.shards.one_based import counts_from_one, numbered, renumber
from trainer.storage.text import LISTED, listed


def cache_of(index: Index, data: DataConfig) -> Cache | None:
    """The cache for these shards; None: they are read directly."""
    return cache_at(data.cache, data.cache_size) if index.is_remote() or data.cache else None


def check_labels(index: Index, classes: int) -> None:
    """Raise DataError, naming shard and key, for a label outside the model's classes."""
    wrong = np.flatnonzero((index.labels < 0) | (index.labels >= classes))
    if len(wrong):
        remedy = (
            renumber(index)
            if counts_from_one(index)
            else f"set model.classes={int(index.labels.max()) + 1} or correct the labels"
        )
        raise DataError(
            f"shard {index.where(int(wrong[0]))}: label {index.labels[wrong[0]]} is outside model.classes={classes} "
            f"({len(wrong)} such images); {remedy}"
        )


def check_classes(train: Index, validation: Index) -> None:
    """Raise DataError if the two have different class names, or cannot be learnt from. Sets with numbers from 0 instead of names are not
    compared by name."""
    named = [index for index in (train, validation) if not numbered(index)]
    if len(named) == 2 and train.classes != validation.classes:
        raise DataError(
            f"{_difference(train, validation)}: class names must be equal; put one classes.txt (a name per line, in order) beside both "
            "sets of shards and run `trilevel index` again"
        )
    if counts_from_one(train):
        raise DataError(f"{train.path}: {renumber(train)}")
    trained, asked = np.unique(train.labels), np.unique(validation.labels)
    if counts_from_one(validation) and numbered(train) and trained[0] == 0 and asked[-1] > trained[-1]:
        raise DataError(f"{validation.path}: {renumber(validation)}. The labels of {train.path} count from 0, to {trained[-1]}")
    if len(trained) == 1:
        raise DataError(
            f"{train.path}: all {len(train):,} training images have the label {_name(train, trained[0])}; check data.labels and the "
            "folder that was packed"
        )
    if not np.isin(asked, trained).any():
        raise DataError(
            f"{validation.path}: no validation image is of a class that has training images; its labels are {_names(validation, asked)}, "
            f"those of {train.path} {_names(train, trained)}; check data.labels and the folders that were packed"
        )


def class_warnings(train: Index, validation: Index, classes: int) -> list[str]:
    """What the labels of a run's data sets leave out, as sentences. classes: of the model."""
    found = []
    present = {int(label) for label in np.unique(train.labels)}
    if missing := classes - len(present):  # may be a typo with billions, so no array of that length
        first = np.array([*islice((label for label in range(classes) if label not in present), LISTED)])
        asked = int((~np.isin(validation.labels, [*present])).sum())
        tested = f"; {asked:,} validation images are of these classes" if asked else ""
        more = f" and {missing - len(first)} more" if missing > len(first) else ""
        found.append(
            f"{missing} of model.classes={classes} classes have no training image: {_names(train, first)}{more}{tested}"
        )
    if train.fingerprint == validation.fingerprint:
        found.append("data.validation has the same shards as data.train: the score is that of images it was trained with")
    elif shared := _shared_shards(train, validation):
        images = sum(shard["examples"] for shard in shared)
        found.append(
            f"data.train contains {len(shared)} of the {len(validation.shards)} shards of data.validation "
            f"({listed(shard['name'] for shard in shared)}): {images:,} of its {len(validation):,} images are trained with; name the "
            "training shards alone in data.train, or pack other images for validation"
        )
    if len(asked := np.unique(validation.labels)) == 1:
        found.append(f"all {len(validation):,} validation images have the label {_name(validation, asked[0])}")
    if numbered(train) != numbered(validation):
        with_names, with_numbers = ("data.validation", "data.train") if numbered(train) else ("data.train", "data.validation")
        other = validation if numbered(train) else train
        taken = ", ".join(f"{number} as {name!r}" for number, name in enumerate(other.classes[:3]))
        found.append(
            f"labels of {with_names} are names and those of {with_numbers} numbers, which are taken as positions: {taken}, ..."
        )
    return found


def _shared_shards(train: Index, validation: Index) -> list[dict[str, Any]]:
    """Shards of the validation set whose content is a training shard too, under whatever name."""
    trained = {shard["whole"] for shard in train.shards}
    return [shard for shard in validation.shards if shard["whole"] in trained]


def file_warnings(data: DataConfig, *indexes: Index) -> list[str]:
    """A sentence for each data set that is read from image files instead of shards."""
    patterns = (data.train, data.validation)
    return [
        f"{pattern}: {len(index):,} image files are opened one by one, which is slower than shards, most of all on network storage; for "
        f"many epochs: trilevel pack {pattern} DST"
        for pattern, index in zip(patterns, indexes, strict=True)
        if index.is_files()
    ]


def _difference(train: Index, validation: Index) -> str:
    ours, theirs = set(train.classes), set(validation.classes)
    if ours == theirs:
        number, (a, b) = next(
            (i, pair) for i, pair in enumerate(zip(train.classes, validation.classes, strict=True)) if pair[0] != pair[1]
        )
        return f"the same {len(ours)} classes in another order: class {number} is {a!r} in {train.path} and {b!r} in {validation.path}"
    parts = [
        f"{len(index.classes)} classes in {index.path}" + (f" ({listed(map(repr, sorted(more)))} only there)" if more else "")
        for index, more in ((train, ours - theirs), (validation, theirs - ours))
    ]
    return " and ".join(parts)


def _name(index: Index, label: int) -> str:
    return repr(index.classes[label] if label < len(index.classes) else str(label))


def _names(index: Index, labels: np.ndarray) -> str:
    return listed(_name(index, label) for label in labels)


def open_indexes(data: DataConfig, verify: bool = True) -> tuple[Index, Index]:
    """The indexes of training and validation shards, checked against the shards unless `verify` is False."""
    how = data.verify if verify else None
    return opened(data.train, data, how), opened(data.validation, data, how)


def opened(pattern: str, data: DataConfig, verify: Literal["fast", "full"] | None) -> Index:
    """The index of the shards `pattern`, with the labels and index folder of `data`, checked as in `open_index`."""
    return open_index(pattern, data.labels, verify, folder=data.index)
