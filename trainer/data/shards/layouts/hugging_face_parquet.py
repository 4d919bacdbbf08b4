"""Parquet files of Hugging Face's datasets: a column of images ({bytes, path}) and a column of labels.

Needs pyarrow, which is imported nowhere else. Rows of a parquet file cannot be read alone, and shuffling needs that: the images are first
copied into plain tars in the folder of the shards, which are removed at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.writer import TarWriter

from trainer.data.errors import DataError
from trainer.data.shards.layouts.hugging_face_folder import label_column
from trainer.data.shards.layouts.layout import Contents, Layout, Options, split_of, without_labels
from trainer.data.shards.source_files import Found, SourceFiles, tar_files, unpacked
from trainer.data.shards.source_image import SourceImage

_PART = re.compile(r"(.*)-(\d+)-of-(\d+)\.parquet")  # as `datasets` names the files of a split
_ROWS = 64  # read at once
_SIGNS = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
    (b"BM", "bmp"),
    (b"GIF8", "gif"),
    (b"II*", "tif"),
    (b"MM\0*", "tif"),
)


def _arrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("pack: parquet files need pyarrow; pip install 'trilevel[parquet]'") from error
    return pyarrow


def _files(files: SourceFiles) -> list[Found]:
    return [one for one in files.ending(".parquet") if one.length < 0]


@contextmanager
def _damage_of(path: str) -> Iterator[Any]:
    """Errors of pyarrow inside name the file."""
    arrow = _arrow()
    try:
        yield arrow
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"pack {path}: cannot be read as parquet: {error}; download it again") from error


def _opened(path: str) -> Any:
    with _damage_of(path) as arrow:
        return arrow.parquet.ParquetFile(path)


def _features(metadata: dict[bytes, bytes] | None, path: str) -> dict[str, list[str]]:
    """{column: its class names}, from what `datasets` writes into a file."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        labels = {
            key: about["names"]
            for key, about in features.items()
            if isinstance(about, dict) and about.get("_type") == "ClassLabel"
        }
        return {key: [str(name) for name in names] for key, names in labels.items()}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"pack {path}: its metadata of datasets is damaged ({error}); download it again") from error


def _image_columns(schema: Any) -> list[str]:
    """Columns of {bytes, path}."""
    structs = [f for f in schema if _arrow().types.is_struct(f.type)]
    return [f.name for f in structs if {f.type.field(i).name for i in range(f.type.num_fields)} >= {"bytes", "path"}]


def _recognise(files: SourceFiles) -> str | None:
    parquet = _files(files)
    if not parquet or files.images:
        return None
    columns = _image_columns(_opened(parquet[0].path).schema_arrow)
    return f"{len(parquet)} parquet files with the image column {', '.join(columns)!r}" if columns else None


def _split_of(one: Found, options: Options) -> str:
    return split_of(one.name) or options.split()


def _refuse_incomplete(files: SourceFiles, options: Options) -> None:
    """Raise DataError where a part of a split is missing, or where the files of a split lie in several folders."""
    parts: dict[tuple[str, str], set[int]] = {}
    folders: dict[str, set[str]] = {}
    for one in _files(files):
        folders.setdefault(_split_of(one, options), set()).add(one.name.rpartition("/")[0])
        if match := _PART.fullmatch(one.name):
            parts.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (name, total), found in parts.items():
        if found != set(range(int(total))):
            raise DataError(
                f"pack {files.src}: {len(found)} of the {int(total)} files {name}-*-of-{total}.parquet; download the others"
            )
    for split, names in folders.items():
        if len(names) > 1:
            listed = ", ".join(sorted(name or "." for name in names))
            raise DataError(
                f"pack {files.src}: {split} files in {len(names)} folders ({listed}), as of several configurations of a data set; pack "
                "one: trilevel pack SRC/FOLDER DST"
            )


def _read(files: SourceFiles, options: Options) -> Contents:
    if Path(files.src).is_dir():  # a file given alone is what was meant
        _refuse_incomplete(files, options)
    splits: dict[str, list[SourceImage]] = {}
    notes = []
    for number, one in enumerate(_files(files)):
        split = _split_of(one, options)
        table = _opened(one.path)
        images = _image_columns(table.schema_arrow)
        if len(images) != 1:
            raise DataError(f"pack {one.path}: {len(images)} image columns ({', '.join(images)}), must be 1; remove the others")
        labels = _labels(table, one.path, options)
        tar = unpacked(one, options.scratch, lambda path, file, column=images[0]: _copy(path, file, column))
        found = []
        for image, label in zip(tar_files(str(tar)), labels, strict=True):
            stem, _, extension = image.name.rpartition(".")
            name = f"{one.name} row {int(stem)}"
            if label is not None:
                found.append(
                    SourceImage(f"{number:05d}_{stem}", label, extension, str(tar), image.offset, image.length, name=name)
                )
        if len(found) < len(labels):
            notes.append(without_labels(split, len(labels) - len(found), one.name))
        splits.setdefault(split, []).extend(found)
    return Contents({split: group for split, group in sorted(splits.items()) if group}, notes)


def _labels(table: Any, path: str, options: Options) -> list[str | None]:
    """The class of each row, by name where the file's features have names; None where it is null or -1, as in unlabelled splits."""
    schema = table.schema_arrow
    named = _features(schema.metadata, path)
    types = _arrow().types
    plain = [f.name for f in schema if types.is_integer(f.type) or types.is_string(f.type) or types.is_large_string(f.type)]
    column = label_column(list(named) if named and not options.labels else plain, options.labels, f"pack {path}")
    with _damage_of(path):
        values = table.read(columns=[column]).column(column).to_pylist()
    names = named.get(column)
    try:
        return [None if value in (None, -1) else str(value if names is None else names[value]) for value in values]
    except (IndexError, TypeError) as error:
        raise DataError(f"pack {path}: a value of {column} is outside its {len(names or ())} class names") from error


def _copy(path: Path, file: BinaryIO, column: str) -> None:
    """The images of a parquet file as a tar of row numbers."""
    with TarWriter(file, encoder=False, mtime=0) as tar, _damage_of(str(path)):
        row = 0
        for batch in _opened(str(path)).iter_batches(batch_size=_ROWS, columns=[column]):
            for image in batch.column(0).to_pylist():
                data = image and image.get("bytes")
                if not data:
                    raise DataError(
                        f"pack {path}: row {row} has no bytes (a path alone, or null); save the data set with its images in it"
                    )
                extension = next((name for sign, name in _SIGNS if data.startswith(sign)), "jpg")
                tar.write({"__key__": f"{row:08d}", extension: data})
                row += 1


LAYOUT = Layout(
    "hugging_face_parquet", "parquet files with an image column and a label column", _recognise, _read, numbers=True
)
