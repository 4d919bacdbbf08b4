"""CIFAR-10 and CIFAR-100 in their python version: pickles of 32 x 32 pixels, written as PNG without loss. CIFAR-100: the fine classes."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from trainer.data.errors import DataError
from trainer.data.shards.layouts.cifar_pickle import read_batch
from trainer.data.shards.layouts.layout import Contents, Layout, Options
from trainer.data.shards.source_files import Found, SourceFiles
from trainer.data.shards.source_image import SourceImage

_SIDE = 32


class _Version(NamedTuple):
    """train, test, meta: file names; labels: key of the labels in a batch; names: key of the class names in meta."""

    title: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str


_VERSIONS = (
    _Version("CIFAR-10", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "labels", "label_names"),
    _Version("CIFAR-100", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
)


def _find(files: SourceFiles) -> tuple[_Version, dict[str, Found]] | None:
    """The version, and its files by their names, all in one folder."""
    for version in _VERSIONS:
        for one in files.ending(version.meta):
            top = one.name.removesuffix(version.meta)
            found = {name: files.others.get(top + name) for name in (*version.train, version.test, version.meta)}
            there = {name: file for name, file in found.items() if file is not None}
            if (not top or top.endswith("/")) and len(there) > 1:
                return version, there
    return None


def _recognise(files: SourceFiles) -> str | None:
    found = _find(files)
    return f"{found[0].title}, python version: {', '.join(found[1])}" if found else None


def _read(files: SourceFiles, options: Options) -> Contents:
    found = _find(files)
    assert found is not None
    version, there = found
    if missing := [name for name in (*version.train, version.test) if name not in there]:
        raise DataError(f"pack {files.src}: {version.title} without {', '.join(missing)}; unpack the archive again")
    names = _batch(there[version.meta]).get(version.names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"pack {files.src}: {version.meta} has no {version.names}; unpack the archive again")
    splits = {"train": [i for name in version.train for i in _images(there[name], version, names)]}
    return Contents(splits | {"test": _images(there[version.test], version, names)})


def _batch(one: Found) -> dict[str, Any]:
    try:
        return read_batch(one.read())
    except ValueError as error:
        raise DataError(f"pack {one.path}: {one.name}: {error}; download the archive again") from error


def _images(one: Found, version: _Version, names: list[str]) -> list[SourceImage]:
    batch = _batch(one)
    pixels, labels = batch.get("data"), batch.get(version.labels)
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (3 * _SIDE**2,) or not isinstance(labels, list):
        raise DataError(f"pack {one.path}: {one.name} has no pixels or no {version.labels}; download the archive again")
    if len(labels) != len(pixels) or not all(isinstance(label, int) and 0 <= label < len(names) for label in labels):
        raise DataError(f"pack {one.path}: {one.name}: {len(pixels)} images, {len(labels)} labels; download the archive again")
    images, stem = [], one.name.rpartition("/")[2]
    for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        file = io.BytesIO()
        PIL.Image.fromarray(image.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)).save(file, "PNG")
        key = f"{names[label]}_{stem}_{row:05d}"
        images.append(SourceImage(key, names[label], "png", one.path, 0, file.tell(), file.getvalue(), f"{one.name} row {row}"))
    return images


LAYOUT = Layout(
    "cifar", "CIFAR-10 or CIFAR-100, python version: cifar-10-python.tar.gz or what it unpacks to", _recognise, _read
)
