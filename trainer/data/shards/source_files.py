"""The files of a source of `trilevel pack`, a folder or a tar: listed by name, not read."""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import zlib
from bz2 import BZ2File
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from gzip import GzipFile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.data.errors import DataError
from trainer.data.shards.samples import fingerprint
from trainer.data.shards.tar import IMAGES, members
from trainer.storage.disk import atomic_write

_OPENERS = {".xz": lzma.LZMAFile, ".gz": GzipFile, ".tgz": GzipFile, ".bz2": BZ2File}
_LARGEST = 1 << 30  # bytes of a list of labels or of a pickle
_PATHS = 16  # on which one folder may be found
_IGNORED = ".xml"  # half a million annotations in Kaggle's ILSVRC, with boxes


class Found(NamedTuple):
    """A file of a source. name: below the source, "/" between folders. Its bytes: a range of the file `path`, length < 0: all of it."""

    name: str
    path: str
    offset: int
    length: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            length = os.fstat(file.fileno()).st_size if self.length < 0 else self.length
            if length > _LARGEST:
                raise DataError(f"pack {self.path}: {self.name!r} has {length} bytes, must be <= {_LARGEST}")
            return os.pread(file.fileno(), length, self.offset)


class SourceFiles:
    """The files of a source. src: as the user wrote it; images: by extension; others: the rest, by name. Hidden files are left out."""

    def __init__(self, src: str, found: Iterable[Found]) -> None:
        self.src, self.images, self.others = src, list[Found](), dict[str, Found]()
        for one in found:
            if _is_image(one.name):
                self.images.append(one)
            elif not _is_hidden(one.name):
                self.others[one.name] = one

    def ending(self, *suffixes: str) -> list[Found]:
        """The other files whose names end so, sorted by name."""
        return [self.others[name] for name in sorted(self.others) if name.endswith(suffixes)]


def list_files(src: str, scratch: Path) -> SourceFiles:
    """The files of a folder, or of a tar, compressed or not. Compressed tars are first unpacked to a plain tar in `scratch`.

    Raises DataError: no such source, a FIFO, a link loop or a broken link among the images, a damaged archive."""
    path = Path(src)
    if path.is_dir():
        return SourceFiles(src, _folder(path))
    if not path.is_file():
        hint = (
            f"; download it first (`hf download ORG/NAME --repo-type dataset --local-dir DIR`), then: trilevel pack DIR {scratch}"
            if src.startswith("hf://")
            else "; give a folder, a tar, a parquet file or `sklearn:digits`"
        )
        raise DataError(f"pack {src}: no such file or folder{hint}")
    if path.suffix in (".parquet", ".zip"):
        return SourceFiles(src, [Found(path.name, str(path), 0, -1)])
    return SourceFiles(src, tar_files(str(_plain(path, scratch))))


def tar_files(path: str, offset: int = 0, length: int = -1) -> Iterator[Found]:
    """The files of an uncompressed tar, which may be a range of bytes of another file."""
    for member in members(path, offset, None if length < 0 else offset + length):
        yield Found(member.name.removeprefix("./"), path, member.offset, member.length)


def unpacked(one: Found, scratch: Path, copy: Callable[[Path, BinaryIO], None]) -> Path:
    """A file in `scratch` that `copy(path, file)` fills from `one`; kept if an earlier, killed pack has finished it. Its name holds the
    hash of `one`, which tells archives of one name and size apart."""
    target = scratch / f".{Path(one.path).name}.{fingerprint(one.path)}.unpacked"
    if not target.is_file():
        with atomic_write(target) as file:
            copy(Path(one.path), file)
    return target


def _plain(path: Path, scratch: Path) -> Path:
    """The tar itself, or an unpacked copy: shuffling needs random access."""
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        return path

    def copy(path: Path, file: BinaryIO) -> None:
        with opener(path, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 22)

    try:
        return unpacked(Found(path.name, str(path), 0, -1), scratch, copy)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"pack {path}: cannot be unpacked: {error}; check that the download is complete") from error


def _is_hidden(name: str) -> bool:
    return any((p.startswith(".") and p != ".") or p == "__MACOSX" for p in name.split("/"))


def _is_image(name: str) -> bool:
    return name.rpartition("/")[2].rpartition(".")[2].lower() in IMAGES and not _is_hidden(name)


def _folder(root: Path) -> Iterator[Found]:
    """Files before folders, each sorted by name. Links are followed, except to a folder that contains them, and to one folder at most
    _PATHS times: with two links to the next folder in each of 18 folders the last one has 2^18 paths."""
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # a folder below the root, and those that contain it
    paths: Counter[tuple[int, int]] = Counter()
    while todo:
        below, above = todo.pop()
        here = os.path.join(root, below)
        try:
            about = os.stat(here)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
            folders = {entry.name for entry in entries if entry.is_dir()}
        except OSError as error:
            raise DataError(f"pack {here}: {error.strerror}; make it readable or remove it") from error
        if (me := (about.st_dev, about.st_ino)) in above:
            raise DataError(f"pack {here}: a link to a folder that contains it; remove it")
        paths[me] += 1
        if paths[me] > _PATHS:
            raise DataError(f"pack {here}: links lead to this folder on more than {_PATHS} paths; remove links")
        for entry in entries:
            name = os.path.join(below, entry.name)
            if entry.name in folders:
                continue
            if _is_image(name):
                yield _image_file(entry, name)
            elif entry.is_file() and not name.endswith(_IGNORED):
                yield Found(name, entry.path, 0, -1)
        todo += [(os.path.join(below, name), (*above, me)) for name in sorted(folders, reverse=True)]


def _image_file(entry: os.DirEntry[str], name: str) -> Found:
    try:
        about = entry.stat()
    except OSError as error:
        raise DataError(f"pack {entry.path}: {error.strerror} (broken link?); remove it") from error
    if not stat.S_ISREG(about.st_mode):  # reading a FIFO would block for ever
        raise DataError(f"pack {entry.path}: not a regular file; remove it")
    return Found(name, entry.path, 0, about.st_size)
