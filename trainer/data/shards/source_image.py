"""An image to pack: its key, its label, its bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from trainer.data.errors import DataError
from trainer.data.keyed_hash import permutation
from trainer.data.shards.source_files import Found


class SourceImage(NamedTuple):
    """An image to pack. label: a class name, or a class number as text. Its bytes: `data`, else a range of a file. name: in its source,
    for messages."""

    key: str
    label: str
    extension: str
    path: str = ""
    offset: int = 0
    length: int = 0
    data: bytes | None = None
    name: str = ""

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), self.length, self.offset)


class Labelled(NamedTuple):
    """A file, its name without the folders that all share (and the split's), and its label."""

    found: Found
    name: str
    label: str


def extension_of(name: str) -> str:
    """Of a packed image: what follows the last dot, in small letters; jpg for jpeg, tif for tiff."""
    extension = name.rpartition(".")[2].lower()
    return {"jpeg": "jpg", "tiff": "tif"}.get(extension, extension)


def with_keys(src: str, labelled: Iterable[Labelled]) -> list[SourceImage]:
    """Images with webdataset keys made of their names. Raises DataError where two would get the same key."""
    result, names = [], {}
    for found, name, label in labelled:
        stem = name.rpartition(".")[0]
        file = stem.rpartition("/")[2]
        key = file if "/" not in name or file.startswith(f"{label}_") else stem.replace("/", "_")
        key = key.replace(".", "_")  # webdataset keys end at the first dot
        if key in names:
            raise DataError(f"pack {src}: {names[key]!r} and {found.name!r} would both get the key {key!r}; rename one")
        names[key] = found.name
        result.append(SourceImage(key, label, extension_of(name), found.path, found.offset, found.length, name=found.name))
    return result


def digits(seed: int) -> dict[str, list[SourceImage]]:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8 grey PNG; a fifth, drawn by seed, is the validation split."""
    import PIL.Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    shuffled = permutation(len(digits.target), seed, len(digits.target))
    held_out = set(shuffled[: len(shuffled) // 5].tolist())
    splits: dict[str, list[SourceImage]] = {"train": [], "validation": []}
    for i, (grey, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = io.BytesIO()
        PIL.Image.fromarray((grey * (255 / 16)).round().astype("uint8")).save(file, "PNG")
        key = f"digit_{i:04d}"
        image = SourceImage(key, str(label), "png", length=file.tell(), data=file.getvalue(), name=key)
        splits["validation" if i in held_out else "train"].append(image)
    return splits
