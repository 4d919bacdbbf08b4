"""Sources of `trilevel pack`: folders, tars, tars of tars, scikit-learn's digits. Lists the images without reading them."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import stat
import zlib
from bz2 import BZ2File
from collections.abc import Iterator
from gzip import GzipFile
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.errors import DataError
from trainer.data.keyed_hash import permutation
from trainer.data.shards.label_file import label_table
from trainer.data.shards.samples import fingerprint
from trainer.data.shards.tar import IMAGES, members
from trainer.storage.disk import atomic_write

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_OPENERS = {".xz": lzma.LZMAFile, ".gz": GzipFile, ".tgz": GzipFile, ".bz2": BZ2File}


class SourceImage(NamedTuple):
    """An image to pack. label: a class name, or a class number as text. Its bytes: `data`, else a range of a file."""

    key: str
    label: str
    extension: str
    path: str = ""
    offset: int = 0
    length: int = 0
    data: bytes | None = None

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), self.length, self.offset)


class _Found(NamedTuple):
    name: str
    path: str
    offset: int
    length: int


def images(src: str, labels: str | None, name: str, seed: int, scratch: Path) -> dict[str, list[SourceImage]]:
    """{split: its images} of a source. Top folders named train, val, test ... give one split each; else all images are in split `name`.

    Compressed tars are first unpacked to a plain tar in `scratch`. Raises DataError: no images, names without a class, two
    images with one key.
    """
    if src == "sklearn:digits":
        return _digits(seed)
    path = Path(src)
    if path.is_dir():
        found = list(_folder(path))
    elif path.is_file():
        found = list(_tar(_plain(path, scratch)))
    else:
        raise DataError(f"pack {src}: no such file or folder; give a folder, a tar or `sklearn:digits`")
    found = [f for f in found if _is_image(f.name)]
    if not found:
        raise DataError(f"pack {src}: no images found; supported extensions: {', '.join(sorted(IMAGES))}")
    parts = [tuple(f.name.split("/")) for f in found]
    while len(firsts := {p[0] for p in parts if len(p) > 1}) == 1 and all(len(p) > 1 for p in parts):
        rest = [p[1:] for p in parts]
        if labels is None and all(len(p) == 1 for p in rest) and not all("_" in p[0] for p in rest):
            break  # one class only: its folder holds the name
        parts = rest
    if len(firsts) > 1 and firsts <= SPLITS.keys() and all(len(p) > 1 for p in parts):
        groups = {
            split: [i for i, p in enumerate(parts) if SPLITS[p[0]] == split] for split in sorted({SPLITS[f] for f in firsts})
        }
        parts = [p[1:] for p in parts]
    else:
        groups = {name: list(range(len(parts)))}
    return {split: _named(src, [found[i] for i in g], [parts[i] for i in g], labels) for split, g in groups.items()}


def _named(src: str, found: list[_Found], parts: list[tuple[str, ...]], labels: str | None) -> list[SourceImage]:
    stems = ["/".join(p).rpartition(".")[0] for p in parts]
    table = label_table(Path(labels), stems) if labels is not None else None
    result, names = [], {}
    for one, part, stem in zip(found, parts, stems, strict=True):
        file, extension = part[-1].rpartition(".")[0], part[-1].rpartition(".")[2].lower()
        if table is not None:
            label = table[stem]
        elif len(part) > 1:
            label = part[0]
        elif "_" in file:
            label = file.partition("_")[0]
        else:
            raise DataError(
                f"pack {src}: no class in {one.name!r}: neither a class folder nor `class_name`; pass --labels FILE"
            )
        key = file if len(part) == 1 or file.startswith(f"{label}_") else stem.replace("/", "_")
        key = key.replace(".", "_")  # webdataset keys end at the first dot
        if key in names:
            raise DataError(f"pack {src}: {names[key]!r} and {one.name!r} would both get the key {key!r}; rename one")
        names[key] = one.name
        extension = {"jpeg": "jpg", "tiff": "tif"}.get(extension, extension)
        result.append(SourceImage(key, label, extension, one.path, one.offset, one.length))
    return result


def _is_image(name: str) -> bool:
    parts = name.split("/")
    hidden = any((p.startswith(".") and p != ".") or p == "__MACOSX" for p in parts)
    return not hidden and parts[-1].rpartition(".")[2].lower() in IMAGES


def _folder(root: Path, below: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[_Found]:
    """Files before folders, each sorted by name. Links are followed, except to a folder that contains this one (`above`)."""
    here = os.path.join(root, below)
    try:
        about = os.stat(here)
        entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        folders = {entry.name for entry in entries if entry.is_dir()}
    except OSError as error:
        raise DataError(f"pack {here}: {error.strerror}; make it readable or remove it") from error
    if (me := (about.st_dev, about.st_ino)) in above:
        raise DataError(f"pack {here}: a link to a folder that contains it; remove it")
    for entry in entries:
        if entry.name not in folders and _is_image(os.path.join(below, entry.name)):
            yield _file(entry, os.path.join(below, entry.name))
    for name in sorted(folders):
        yield from _folder(root, os.path.join(below, name), (*above, me))


def _file(entry: os.DirEntry[str], name: str) -> _Found:
    try:
        about = entry.stat()
    except OSError as error:
        raise DataError(f"pack {entry.path}: {error.strerror} (broken link?); remove it") from error
    if not stat.S_ISREG(about.st_mode):  # reading a FIFO would block for ever
        raise DataError(f"pack {entry.path}: not a regular file; remove it")
    return _Found(name, entry.path, 0, about.st_size)


def _tar(path: Path) -> Iterator[_Found]:
    for member in members(path):
        name = member.name.removeprefix("./")
        if name.endswith(".tar"):  # ILSVRC2012_img_train.tar: a tar of one tar per class
            stem = name.rpartition("/")[2].removesuffix(".tar")
            for inner in members(path, member.offset, member.offset + member.length):
                yield _Found(f"{stem}/{inner.name.removeprefix('./')}", str(path), inner.offset, inner.length)
        else:
            yield _Found(name, str(path), member.offset, member.length)


def _plain(path: Path, scratch: Path) -> Path:
    """The tar itself, or an unpacked copy: shuffling needs random access."""
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        return path
    target = scratch / f".{path.name}.{fingerprint(path)}.unpacked"  # the hash tells archives of one name and size apart
    if not target.is_file():
        try:
            with opener(path, "rb") as source, atomic_write(target) as file:
                shutil.copyfileobj(source, file, 1 << 22)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"pack {path}: cannot be unpacked: {error}; check that the download is complete") from error
    return target


def _digits(seed: int) -> dict[str, list[SourceImage]]:
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
        image = SourceImage(f"digit_{i:04d}", str(label), "png", length=file.tell(), data=file.getvalue())
        splits["validation" if i in held_out else "train"].append(image)
    return splits
