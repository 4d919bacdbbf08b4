"""Hugging Face's imagefolder with labels in metadata.csv or metadata.jsonl: lines of `file_name` (below the metadata's folder) and label.

Without such a file an imagefolder is class folders."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from typing import Any

from trainer.data.errors import DataError
from trainer.data.shards.class_names import decoded
from trainer.data.shards.layouts.layout import SPLITS, Contents, Layout, Options
from trainer.data.shards.source_files import Found, SourceFiles
from trainer.data.shards.source_image import Labelled, with_keys

_METADATA = ("metadata.csv", "metadata.jsonl")


def _lists(files: SourceFiles) -> list[Found]:
    return [one for one in files.ending(*_METADATA) if one.name.rpartition("/")[2] in _METADATA]


def _recognise(files: SourceFiles) -> str | None:
    lists = _lists(files)
    if not lists or not files.images or not all("file_name" in _rows(one)[0] for one in lists):
        return None
    return f"{', '.join(one.name for one in lists)} with the column file_name"


def _rows(one: Found) -> list[dict[str, Any]]:
    text = decoded(one.read(), f"pack {one.path}")
    try:
        if one.name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text))) or [{}]
        return [dict(json.loads(line)) for line in text.splitlines() if line.strip()] or [{}]
    except (ValueError, TypeError, csv.Error, RecursionError) as error:
        raise DataError(f"pack {one.path}: {one.name} cannot be read: {error}; correct that file") from error


def label_column(columns: list[str], given: str | None, where: str) -> str:
    """The column of the class. given: --labels column:NAME. Raises DataError where it is not clear."""
    wanted = given.removeprefix("column:") if given and given.startswith("column:") else None
    if wanted in columns:
        return str(wanted)
    if wanted is None and ("label" in columns or len(columns) == 1):
        return "label" if "label" in columns else columns[0]
    raise DataError(f"{where}: columns {', '.join(columns) or 'none'}; choose that of the class with --labels column:NAME")


def _read(files: SourceFiles, options: Options) -> Contents:
    images = {posixpath.normpath(image.name): image for image in files.images}
    splits: dict[str, list[Labelled]] = {}
    for one in _lists(files):
        rows, folder = _rows(one), posixpath.dirname(one.name)
        column = label_column([c for c in rows[0] if c != "file_name"], options.labels, f"pack {one.path}")
        for number, row in enumerate(rows, 1):
            name, label = posixpath.normpath(posixpath.join(folder, str(row.get("file_name")))), row.get(column)
            image = images.pop(name, None)
            if image is None or not isinstance(label, (str, int)) or isinstance(label, bool) or label == "":
                problem = f"{column}={label!r}" if image else "that image does not exist, or has two lines"
                raise DataError(
                    f"pack {one.path}: {one.name}, row {number}, {row.get('file_name')!r}: {problem}; correct that file"
                )
            split, below = _split_of(name, options)
            splits.setdefault(split, []).append(Labelled(image, below, str(label)))
    if images:
        raise DataError(
            f"pack {files.src}: {len(images)} images are in no metadata file, e.g. {min(images)!r}; add their lines or move them elsewhere"
        )
    return Contents({split: with_keys(files.src, group) for split, group in sorted(splits.items())})


def _split_of(name: str, options: Options) -> tuple[str, str]:
    """(split, name below its folder): the first folder that is named like a split."""
    parts = name.split("/")
    place = next((i for i, part in enumerate(parts[:-1]) if part.lower() in SPLITS), None)
    return (options.split(), name) if place is None else (SPLITS[parts[place].lower()], "/".join(parts[place + 1 :]))


LAYOUT = Layout(
    "hugging_face_folder", "images and metadata.csv or metadata.jsonl with file_name and label", _recognise, _read, numbers=True
)
