"""Where a set of shards lies and where its index is: beside the shards, or in a folder of this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trainer.data.cache import Cache, home
from trainer.data.remote import Absent, DataError, Facts, scheme, stream
from trainer.data.shards import expand


class Place(NamedTuple):
    """The shards of a pattern. root: directory or URL above them ("" for pipes); names: relative to it; index: the file."""

    root: str
    names: list[str]
    index: Path

    def is_remote(self) -> bool:
        return self.root == "" or bool(scheme(self.root))

    def url(self, name: str) -> str:
        return joined(self.root, name)

    def beside(self) -> bool:
        """Whether the index lies with the shards, so that both may be moved together."""
        return not self.is_remote() and self.index.parent == Path(self.root)

    def classes(self) -> list[str] | None:
        """The names in `classes.txt` beside the shards; None where there is no such file."""
        if not self.root:
            return None
        if not self.is_remote():
            path = Path(self.root, "classes.txt")
            return path.read_text().splitlines() if path.is_file() else None
        try:
            return b"".join(stream(self.url("classes.txt"))).decode().splitlines()
        except Absent:
            return None

    @contextmanager
    def opened(self, name: str, cache: Cache) -> Iterator[tuple[Path, Facts]]:
        """A shard as a file, and what its server says of it. Errors raised inside name the shard, not the cache's file."""
        url = self.url(name)
        if not self.is_remote():
            yield Path(url), Facts(None, "")
            return
        with cache.taken(url) as (path, about):
            try:
                yield path, about
            except DataError as error:
                raise DataError(str(error).replace(str(path), url)) from error


def joined(root: str, name: str) -> str:
    return name if not root else os.path.join(root, name)


def place_of(pattern: str, folder: str | None = None, allow_pipe: bool = False) -> Place:
    """`folder`: of the index; None: beside the shards, and for remote ones TRILEVEL_CACHE/index. Raises DataError: see `expand`."""
    root, stem, names = expand(pattern, allow_pipe)
    if folder is None and not scheme(pattern):
        return Place(root, names, Path(root, f"{stem}.index"))
    where = Path(os.path.expanduser(os.path.expandvars(folder))) if folder else home() / "index"
    about = pattern if not root else root if scheme(root) else os.path.abspath(root)
    return Place(root, names, where / f"{stem}-{hashlib.blake2b(about.encode(), digest_size=6).hexdigest()}.index")


def hash_of(url: str) -> str:
    """Hash of all bytes of a remote shard, read through once."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in stream(url):
        digest.update(piece)
    return digest.hexdigest()
