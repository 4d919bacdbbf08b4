"""Tars of webdataset: members 0001.jpg and 0001.cls. `trilevel index` reads them where they are; packing shuffles them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from trainer.data.errors import DataError
from trainer.data.shards.labels import label_of
from trainer.data.shards.layouts.layout import Contents, Layout, Options, split_of
from trainer.data.shards.samples import samples
from trainer.data.shards.source_files import Found, SourceFiles, tar_files
from trainer.data.shards.source_image import SourceImage, extension_of
from trainer.data.shards.tar import IMAGES

_PEEK = 50  # members of the first tar
_LABELS = frozenset({"cls", "json"})


def is_webdataset(names: Iterable[str]) -> bool:
    """Whether an image and a label are members of one sample."""
    kinds: dict[str, set[str]] = {}
    for name in names:
        base, extension = base_plus_ext(name)
        if base and extension:
            last = extension.rsplit(".", 1)[-1].lower()
            kinds.setdefault(base, set()).add("image" if last in IMAGES else last)
    return any("image" in group and group & _LABELS for group in kinds.values())


def _tars(files: SourceFiles) -> list[Found]:
    return [one for one in files.ending(".tar") if one.length < 0]  # in a folder


def _recognise(files: SourceFiles) -> str | None:
    tars = _tars(files)
    inside = Path(files.src).is_file() and is_webdataset([*(i.name for i in files.images[:_PEEK]), *files.others])
    if inside:
        return "images with a .cls or .json beside them"
    if files.images or not tars:
        return None
    first = [one.name for one in islice(tar_files(tars[0].path), _PEEK)]
    return f"{len(tars)} tars, images with a .cls or .json beside them" if is_webdataset(first) else None


def _read(files: SourceFiles, options: Options) -> Contents:
    paths = [(one.name, one.path) for one in _tars(files)] or [("", files.images[0].path)]
    label, splits = label_of(options.labels or "cls"), dict[str, dict[str, SourceImage]]()
    for name, path in paths:
        split = split_of(name) or options.split()
        group = splits.setdefault(split, {})
        for sample in samples(path):
            try:
                text = label(Path(path), sample)
            except DataError as error:
                raise DataError(f"{error}; for trilevel pack: --labels json:FIELD or --labels key") from error
            key = re.sub(r"[/.]", "_", sample.key)
            if key in group:
                raise DataError(f"pack {files.src}: key {sample.key!r} of {path} exists twice; rename one")
            group[key] = SourceImage(
                key, text, extension_of(sample.image.name), path, sample.image.offset, sample.image.length,
                name=f"{name}/{sample.image.name}".removeprefix("/"),
            )  # fmt: skip
    return Contents({split: list(group.values()) for split, group in splits.items()})


LAYOUT = Layout(
    "webdataset", "tars of 0001.jpg with 0001.cls, or 0001.json and --labels json:FIELD", _recognise, _read, numbers=True
)
