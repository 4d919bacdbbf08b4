"""A size-limited cache of shards on the node, shared by all its processes: for remote shards, and for slow file systems.

A file is named by the hash of its bytes and appears by a rename after its hash was checked, so no reader finds a partial file. It
is written as `.part` under its own flock, which the kernel releases when the process dies: the next process that needs space removes
the leftover. Sizes are summed and files evicted, least recently used first, under one lock of the folder. A reader with an open
descriptor keeps the bytes of an evicted file. Only files named as in `cache_folder` are written or deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.data.errors import Changed, DataError, StorageUnavailable
from trainer.data.remote import cache_folder
from trainer.data.remote.cache_check import CacheCheck, record_use
from trainer.data.remote.client import RemoteStat, stat, stream
from trainer.data.remote.url import scheme

_USED = 2.0  # seconds after a use in which another use is not recorded
_WHOLE_TRIES = 3  # downloads of a shard whose hash differs from the index's
_STEP = 64 << 20  # space reserved at a time for a shard of unknown size


class Source(NamedTuple):
    """A shard as the index lists it: URL or path, size, hash of all its bytes."""

    url: str
    bytes: int
    whole: str


@dataclass(frozen=True)
class Cache:
    """folder: on a disk of the node. size: limit in bytes for all shards in it together. check: what is known of its files."""

    folder: Path
    size: int
    check: CacheCheck = field(default_factory=CacheCheck, compare=False, repr=False)

    def open(self, source: Source) -> int:
        """A descriptor of the shard's bytes; downloads it if missing. Raises DataError, StorageUnavailable if the disk fails."""
        while True:
            with self._disk():
                self._prepare(source.url)
            if (file := self._cached(source)) is not None:
                if time.time() - os.fstat(file).st_atime > _USED:
                    record_use(file)
                return file
            self.fetch(source)

    def _cached(self, source: Source) -> int | None:
        """A descriptor of the shard in the cache; None if it is missing, or was damaged and is now removed."""
        path = self._path(source.whole)
        with self._disk():
            try:
                file = cache_folder.open_regular(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            if self.check.has(file, source.bytes, source.whole):
                return file
            if cache_folder.is_same(path, file):
                path.unlink(missing_ok=True)
            os.close(file)
            return None

    def holds(self, source: Source) -> bool:
        """Whether the shard is in the cache and was hashed since the start of the run; counts as a use."""
        with suppress(OSError):
            file = cache_folder.open_regular(self._path(source.whole), os.O_RDONLY)
            try:
                record_use(file)
                return self.check.is_known(file, source.bytes)
            finally:
                os.close(file)
        return False

    def fetch(self, source: Source) -> None:
        """Download the shard, once even if several processes ask at the same time. Raises DataError: missing, changed, too large."""
        final = self._path(source.whole)
        if source.bytes > self.size:
            raise DataError(
                f"shard {source.url} has {source.bytes} bytes, more than data.cache_size ({self.size} bytes); "
                "raise data.cache_size"
            )
        with self._part(source.whole, source.url) as (part, file):
            if (kept := self._cached(source)) is not None:
                return os.close(kept)
            self._reserve(part, file, source.bytes)
            for _ in range(_WHOLE_TRIES):
                with suppress(Changed):
                    if self._written(source.url, source.bytes, part, file) == source.whole:
                        with self._counting():
                            part.rename(final)
                        return
            raise DataError(
                f"shard {source.url} changed since it was indexed: hash mismatch in {_WHOLE_TRIES} downloads; restore it "
                "or run `trilevel index` again"
            )

    @contextmanager
    def import_shard(self, url: str) -> Iterator[tuple[Path, RemoteStat]]:
        """A shard that is not indexed yet, complete at the path inside the context; then kept in the cache. Raises DataError."""
        about = stat(url)
        if about.bytes is not None and about.bytes > self.size:
            raise DataError(
                f"shard {url} has {about.bytes} bytes, more than the cache limit of {self.size} bytes; raise --cache-size"
            )
        with self._part(hashlib.blake2b(url.encode(), digest_size=16).hexdigest(), url) as (part, file):
            self._reserve(part, file, about.bytes or 0)
            whole = self._written(url, about.bytes, part, file)
            yield part, about
            with self._counting():
                part.rename(self._path(whole))

    def refuse_full_disk(self) -> None:
        """Raise DataError if the disk has too little free space for a cache of this size."""
        with self._disk():
            own = self._prepare()
            held = sum(about.st_size for _, about in cache_folder.files(own))
            free = shutil.disk_usage(own).free
        if held + free < self.size:
            raise DataError(
                f"data.cache_size={self.size / 2**30:g} (GiB): only {(held + free) / 2**30:.1f} GiB are free for it in "
                f"{self.folder}; lower data.cache_size, or set data.cache to a folder on a larger disk"
            )

    @property
    def directory(self) -> Path:
        """The only folder the cache writes to and deletes from."""
        return self.folder / cache_folder.NAME

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn an OSError of the disk into StorageUnavailable: it ends the run and is not counted as a broken image."""
        try:
            yield
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise StorageUnavailable(
                f"data.cache={self.folder}: {error.strerror}{where}; use a folder on a local disk of the node"
            ) from error

    def _prepare(self, url: str = "") -> Path:
        """The folder, created if missing. Raises OSError; StorageUnavailable if it is not the cache's, or holds the shard `url`."""
        if url and not scheme(url):
            shards, own = Path(os.path.realpath(url)).parent, Path(os.path.realpath(self.directory))
            if shards == own.parent or shards.is_relative_to(own):
                raise StorageUnavailable(
                    f"data.cache={self.folder}: this folder holds the shards to be cached; use another folder"
                )
        return cache_folder.prepare(self.folder)

    def _path(self, whole: str) -> Path:
        return self.directory / f"{whole}.tar"

    @contextmanager
    def _part(self, name: str, url: str) -> Iterator[tuple[Path, int]]:
        """(path, descriptor) of a `.part` file, locked; waits until its present writer is done, removes it at the end."""
        part = self.directory / f"{name}.part"
        with self._disk():
            self._prepare(url)
            while True:
                file = cache_folder.open_part(part)
                fcntl.flock(file, fcntl.LOCK_EX)
                if cache_folder.is_same(part, file):
                    break
                os.close(file)  # renamed or removed while we waited
        try:
            yield part, file
        finally:
            with suppress(OSError):
                if cache_folder.is_same(part, file):
                    part.unlink(missing_ok=True)
            os.close(file)

    def _written(self, url: str, size: int | None, part: Path, file: int) -> str:
        """Write a shard's bytes to the file; returns their hash."""
        digest, at, taken = hashlib.blake2b(digest_size=16), 0, size or 0
        os.lseek(file, 0, os.SEEK_SET)
        for piece in stream(url, size):
            at += len(piece)
            if at > self.size and size is None:
                raise DataError(f"shard {url} has more than the cache limit of {self.size} bytes; raise --cache-size")
            if at > taken:
                taken = at + _STEP
                self._reserve(part, file, taken, wait=False)  # two growing files would wait for each other
            digest.update(piece)
            view = memoryview(piece)
            with self._writing():
                while view:
                    view = view[os.write(file, view) :]
        with self._writing():
            os.ftruncate(file, at)
            os.fsync(file)
        return digest.hexdigest()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageUnavailable(f"data.cache={self.folder}: {error.strerror}; lower data.cache_size") from error

    def _reserve(self, part: Path, file: int, need: int, wait: bool = True) -> None:
        """Reserve `need` bytes of the cache for a file being written: evicts the least recently used shards and waits for the downloads
        of other processes. A file of unknown size does not wait (`wait` False), and may grow up to the size of the cache."""
        while True:
            with self._counting():
                if self._evicted(part, need) or not wait:
                    os.ftruncate(file, need)  # the file's size is the reservation
                    return
            time.sleep(0.05)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """The lock of the folder. Renames take it too: a file renamed while sizes are summed would be missed."""
        with self._disk(), cache_folder.locked(self.directory):
            yield

    def _evicted(self, part: Path, need: int) -> bool:
        """Whether `need` bytes are free beside `part`, after evicting shards if necessary."""
        shards, total, writing = [], need, False
        for path, about in cache_folder.files(self.directory):
            if path.name == part.name:
                continue
            if path.suffix == ".tar":
                shards.append((about.st_atime_ns, about.st_size, path))
            elif (written := cache_folder.remove_unfinished(path)) is None:
                continue
            else:
                writing = writing or written
            total += about.st_size
        for _, size, path in sorted(shards):
            if total <= self.size:
                break
            with suppress(OSError):  # deleted meanwhile, or owned by another user
                path.unlink()
                total -= size
        return total <= self.size or not writing


def cache_root() -> Path:
    """Default folder of caches and of indexes of remote shards: TRILEVEL_CACHE, else ~/.cache/trilevel."""
    named = os.environ.get("TRILEVEL_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilevel"


def cache_at(folder: str | None, gib: float) -> Cache:
    """The cache of a configuration: `folder` may name environment variables ($TMPDIR); None: the default folder."""
    return Cache(Path(os.path.expanduser(os.path.expandvars(folder))) if folder else cache_root(), int(gib * 2**30))
