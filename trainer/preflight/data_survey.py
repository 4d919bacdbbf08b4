"""What a data set holds, as far as a first configuration needs it: splits, classes, images, their sizes."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.augment.decode import BrokenImage, header
from trainer.data.errors import DataError
from trainer.data.loader.dataset import check_classes
from trainer.data.shards.index import Index, build_index, open_index
from trainer.data.shards.layouts import class_folders, recognise
from trainer.data.shards.layouts.layout import SPLITS, split_of
from trainer.data.shards.reader import Reader
from trainer.data.shards.source_files import list_files

_SAMPLE = 200  # images whose headers are read


@dataclass(frozen=True)
class Survey:
    """train, validation: shard patterns; side: median of the short sides of sampled training images, in pixels."""

    source: str
    train: str
    validation: str
    labels: str
    images: int
    validation_images: int
    per_class: tuple[int, float, int]
    classes: int
    side: int
    width: int
    height: int

    def text(self) -> str:
        low, middle, high = self.per_class
        return (
            f"{self.source}: {self.images} training and {self.validation_images} validation images, {self.classes} classes, "
            f"{low} to {high} training images per class (median {middle:g}), {self.width} x {self.height} pixels (median)"
        )


def survey(folder: str) -> Survey:
    """Look at a folder of indexed shards, or of class folders below train/ and val/, which are indexed now. Raises DataError: no index,
    no training or no validation split, classes that differ."""
    found = _indexes(folder)
    train = found.get("train")
    name = "validation" if "validation" in found else "test"
    if train is None or name not in found:
        missing = "training" if train is None else "validation"
        split = "train" if train is None else "validation"
        held = (
            ""
            if train is None
            else " (without validation images: pack the training images into a new folder with --hold-out 0.1)"
        )
        raise DataError(
            f"init {folder}: no {missing} shards with an index (found: {', '.join(sorted(found)) or 'none'}); pack them: trilevel pack SRC "
            f"{folder} --name {split}{held}, or index them: trilevel index '{folder}/{split}-*.tar'"
        )
    validation = found[name]
    check_classes(train, validation)
    if train.label_source != validation.label_source:
        raise DataError(
            f"init {folder}: labels of {train.path} from {train.label_source!r}, of {validation.path} from "
            f"{validation.label_source!r}; index both with the same --labels"
        )
    if len(train.classes) < 2:
        raise DataError(f"init {folder}: {len(train.classes)} class, must be >= 2; pack or index with other labels")
    counts = np.bincount(train.labels, minlength=len(train.classes))
    width, height = _size(train, _pattern(folder, train))
    return Survey(
        folder, _pattern(folder, train), _pattern(folder, validation), train.label_source, len(train), len(validation),
        (int(counts.min()), float(np.median(counts)), int(counts.max())), len(train.classes), min(width, height), width, height,
    )  # fmt: skip


def _pattern(folder: str, index: Index) -> str:
    return index.root if index.is_files() else f"{folder.rstrip('/')}/{index.path.stem}-*.tar"


def _indexes(folder: str) -> dict[str, Index]:
    """{split: index} of the patterns STEM-*.tar in a folder, by a word of the stem; else of class folders below train/ and val/."""
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"init {folder}: not a folder; give the folder that `trilevel pack` wrote, e.g. shards/NAME")
    found: dict[str, Index] = {}
    for one in sorted(path.glob("*.index")):
        split = split_of(one.stem)
        if split is None or not any(path.glob(f"{one.stem}-*.tar")):
            continue
        if split in found:
            raise DataError(
                f"init {folder}: two indexes of {split} shards, {found[split].path.name} and {one.name}; remove one"
            )
        found[split] = open_index(f"{folder}/{one.stem}-*.tar", Index(one).label_source, verify=None)
    return found if found or any(path.glob("*.tar")) else _class_folders(folder)


def _class_folders(folder: str) -> dict[str, Index]:
    """{split: index}, made now, of folders named like splits. Raises DataError where the folder has another layout, with the command."""
    files = list_files(folder, Path())
    if not files.images and not files.others:
        return {}
    layout = recognise(files).layout
    splits = sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name.lower() in SPLITS)
    if layout not in (class_folders.OUTER, class_folders.INNER) or not splits:
        name = Path(folder).resolve().name
        alone = layout in (class_folders.OUTER, class_folders.INNER)
        what, held = (", without a validation split", " --hold-out 0.1") if alone else ("", "")
        raise DataError(
            f"init {folder}: not packed, layout {layout.name}{what}; pack it first: trilevel pack {folder} shards/{name}{held}, then: "
            f"trilevel init shards/{name}"
        )
    return {SPLITS[p.name.lower()]: build_index(str(p)) for p in splits}


def _size(index: Index, pattern: str) -> tuple[int, int]:
    """Median width and height of a sample of the images. Raises DataError where none can be read."""
    ids = np.unique(np.linspace(0, len(index) - 1, _SAMPLE).astype(np.int64))
    sizes = []
    for data in Reader(index).read(ids):
        with contextlib.suppress(BrokenImage):
            if not isinstance(data, DataError):
                sizes.append(header(data).size)
    if not sizes:
        words = [pattern, *(["--labels", index.label_source] if index.label_source != "cls" else [])]
        command = f"trilevel verify {shlex.join(words)}"
        raise DataError(f"init: none of {len(ids)} images of {index.path} can be read; list them: {command}")
    width, height = np.median(np.array(sizes), axis=0).astype(int).tolist()
    return width, height
