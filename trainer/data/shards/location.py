"""Locations of a set of shards and of its index: beside the shards, or in a local folder."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trainer.data.errors import DataError, NotFound
from trainer.data.remote.cache import Cache, cache_root
from trainer.data.remote.client import RemoteStat, read_all, stream
from trainer.data.remote.url import scheme
from trainer.data.shards.class_names import LARGEST_FILE, read_classes
from trainer.data.shards.pattern import expand
from trainer.data.shards.source_files import list_files

_MOST_FILES = 300_000  # the header of an index has 250 bytes per file and at most 100 MiB


class ShardSet(NamedTuple):
    """The shards of a pattern. root: directory or URL above them ("" for pipes); names: relative to it; index: the
    file of this pattern only; shared: a name that other patterns may have too, tried if `index` is missing; files: whether the shards
    are image files of class folders."""

    root: str
    names: list[str]
    index: Path
    shared: Path
    files: bool = False

    def is_remote(self) -> bool:
        return self.root == "" or bool(scheme(self.root))

    def url(self, name: str) -> str:
        return joined(self.root, name)

    def classes(self) -> list[str] | None:
        """The names in `classes.txt` beside the shards; None if that file does not exist. Raises Forbidden if it may not be read."""
        if not self.root:
            return None
        if not self.is_remote():
            path = Path(self.root, "classes.txt")
            return read_classes(path.read_bytes(), str(path)) if path.is_file() else None
        url = self.url("classes.txt")
        try:
            data = read_all(url, LARGEST_FILE)
        except NotFound:
            return None
        return read_classes(data, url)

    @contextmanager
    def opened(self, name: str, cache: Cache) -> Iterator[tuple[Path, RemoteStat]]:
        """A shard as a local file, and the server's metadata. Errors raised inside name the shard, not the file in the cache."""
        url = self.url(name)
        if not self.is_remote():
            try:
                yield Path(url), RemoteStat(None, "")
            except OSError as error:
                raise DataError(f"shard {url}: cannot be read: {error.strerror}") from error
            return
        with cache.import_shard(url) as (path, about):
            try:
                yield path, about
            except DataError as error:
                raise DataError(str(error).replace(str(path), url)) from error


def joined(root: str, name: str) -> str:
    return name if not root else os.path.join(root, name)


def locate_shards(pattern: str, folder: str | None = None) -> ShardSet:
    """`folder`: of the index; None: beside the shards, and for remote ones TRILEVEL_CACHE/index. Raises DataError: see `expand`.

    `train-*.tar` has `train.index`; every other pattern (`train-{000..099}.tar`, `train-0*.tar`) has another name, so that
    two patterns with one prefix do not overwrite each other's index.
    """
    if os.path.isdir(pattern) and (images := _images(pattern)):
        named = _index_folder(folder) / f"{os.path.basename(os.path.abspath(pattern))}-{_short(os.path.abspath(pattern))}.index"
        return ShardSet(pattern, images, named, named, files=True)
    root, stem, names = expand(pattern)
    if scheme(pattern):
        written = pattern.removeprefix(root) if root else pattern
    else:
        written = "*.tar" if os.path.isdir(pattern) else os.path.relpath(pattern, root)
    if folder is None and not scheme(pattern):
        shared = Path(root, f"{stem}.index")
        own = shared if written == f"{stem}-*.tar" else Path(root, f"{stem}-{_short(written)}.index")
        return ShardSet(root, names, own, shared)
    where = _index_folder(folder)
    about = pattern if not root else root if scheme(root) else os.path.abspath(root)
    named = where / f"{stem}-{_short(f'{about} {written}')}.index"
    return ShardSet(root, names, named, where / f"{stem}-{_short(about)}.index")


def _index_folder(folder: str | None) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(folder))) if folder else cache_root() / "index"


def _images(folder: str) -> list[str]:
    """The image files of a folder without tars, sorted. Raises DataError above 300,000."""
    if glob.glob(os.path.join(glob.escape(folder), "*.tar")):
        return []
    names = sorted(one.name for one in list_files(folder, Path()).images)
    if len(names) > _MOST_FILES:
        raise DataError(
            f"{folder}: {len(names)} image files, at most {_MOST_FILES} can be read without packing: trilevel pack {folder} DST"
        )
    return names


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def hash_of(url: str) -> str:
    """Hash of all bytes of a remote shard, by one download."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in stream(url):
        digest.update(piece)
    return digest.hexdigest()
