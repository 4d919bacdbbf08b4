"""A bounded store of shards on the node, shared by all its processes: for remote shards, and for slow file systems.

A file is named by the hash of its bytes and appears by a rename, whole and checked, so it is never wrong or half there. It is
written as `.part` under a lock of its own, which the kernel drops with the process: what a killed process leaves is noticed
and removed by the next one that needs room. Room is counted and made under one lock of the folder; the shards longest unused
go first. A reader that has a file open may lose its name, never its bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.data.errors import DataError, Outage
from trainer.data.remote.client import Facts, facts, stream

_USED = 2.0  # seconds within which a second use is not noted
_WHOLE_TRIES = 3  # downloads of a shard whose bytes are not those of the index
_STEP = 64 << 20  # room taken at once for a shard of unknown size


class Source(NamedTuple):
    """A shard as the index knows it: where it comes from, its size, the hash of all its bytes."""

    url: str
    bytes: int
    whole: str


@dataclass(frozen=True)
class Cache:
    """folder: on a disk of the node. size: bytes that all shards in it may take together."""

    folder: Path
    size: int

    def open(self, source: Source) -> int:
        """A descriptor of the shard's bytes; fetches it where it is missing. Raises DataError, Outage where the disk fails."""
        path = self._path(source.whole)
        while True:
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(source)
                continue
            except OSError as error:
                raise self._outage(error) from error
            stat = os.fstat(file)
            if stat.st_size == source.bytes:
                if time.time() - stat.st_mtime > _USED:
                    with suppress(OSError):
                        os.utime(file)
                return file
            os.close(file)  # somebody else's doing
            path.unlink(missing_ok=True)

    def holds(self, source: Source) -> bool:
        """Whether the shard is here; counts as a use."""
        with suppress(OSError):
            os.utime(self._path(source.whole))
            return True
        return False

    def fetch(self, source: Source) -> None:
        """Bring the shard here, once however many ask at the same time. Raises DataError: not there, changed, no room."""
        final = self._path(source.whole)
        if source.bytes > self.size:
            raise DataError(f"shard {source.url} has {source.bytes} bytes, data.cache_size allows {self.size}; raise it")
        with self._part(source.whole) as (part, file):
            if final.exists():
                return
            self._room(part, file, source.bytes)
            for _ in range(_WHOLE_TRIES):
                if self._written(source.url, source.bytes, part, file) == source.whole:
                    with self._counting():
                        part.rename(final)
                    return
            raise DataError(
                f"shard {source.url} changed since it was indexed: its bytes are others; restore it or run `trilevel index` again"
            )

    @contextmanager
    def taken(self, url: str) -> Iterator[tuple[Path, Facts]]:
        """A shard no index knows yet, whole at the path while the context lasts; kept afterwards. Raises DataError."""
        about = facts(url)
        if about.bytes is not None and about.bytes > self.size:
            raise DataError(f"shard {url} has {about.bytes} bytes, the cache may hold {self.size}; raise --cache-size")
        with self._part(hashlib.blake2b(url.encode(), digest_size=16).hexdigest()) as (part, file):
            self._room(part, file, about.bytes or 0)
            whole = self._written(url, about.bytes, part, file)
            yield part, about
            with self._counting():
                part.rename(self._path(whole))

    def refuse_full_disk(self) -> None:
        """Raise DataError where the disk has no room for a cache of this size."""
        try:
            self._shards.mkdir(parents=True, exist_ok=True)
            held = sum(entry.stat().st_size for entry in os.scandir(self._shards))
            free = shutil.disk_usage(self._shards).free
        except OSError as error:
            raise self._outage(error) from error
        if held + free < self.size:
            raise DataError(
                f"data.cache_size={self.size / 2**30:g} (GiB): {self.folder} has room for {(held + free) / 2**30:.1f}; set "
                "data.cache_size to less, or data.cache to a folder on a larger disk"
            )

    def _outage(self, error: OSError) -> Outage:
        return Outage(f"data.cache={self.folder}: {error.strerror}; name a folder on a disk of the node")

    @property
    def _shards(self) -> Path:
        return self.folder / "shards"

    def _path(self, whole: str) -> Path:
        return self._shards / f"{whole}.tar"

    @contextmanager
    def _part(self, name: str) -> Iterator[tuple[Path, int]]:
        """(path, descriptor) of a file being written, ours alone; waits for whoever writes it now, removes it at the end."""
        part = self._shards / f"{name}.part"
        try:
            self._shards.mkdir(parents=True, exist_ok=True)
            while True:
                file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(file, fcntl.LOCK_EX)
                if _same(part, file):
                    break
                os.close(file)  # renamed or removed while we waited
        except OSError as error:
            raise self._outage(error) from error
        try:
            yield part, file
        finally:
            if _same(part, file):
                part.unlink(missing_ok=True)
            os.close(file)

    def _written(self, url: str, size: int | None, part: Path, file: int) -> str:
        """Write a shard's bytes to the file; their hash."""
        digest, at, taken = hashlib.blake2b(digest_size=16), 0, size or 0
        os.lseek(file, 0, os.SEEK_SET)
        for piece in stream(url, size):
            at += len(piece)
            if at > taken:
                taken = at + _STEP
                self._room(part, file, taken, wait=False)  # two files that grow would wait for each other
            digest.update(piece)
            view = memoryview(piece)
            try:
                while view:
                    view = view[os.write(file, view) :]
            except OSError as error:
                raise Outage(f"data.cache={self.folder}: {error.strerror}; set data.cache_size to less") from error
        try:
            os.ftruncate(file, at)
            os.fsync(file)
        except OSError as error:
            raise Outage(f"data.cache={self.folder}: {error.strerror}; set data.cache_size to less") from error
        return digest.hexdigest()

    def _room(self, part: Path, file: int, need: int, wait: bool = True) -> None:
        """Take `need` bytes of the cache for a file being written: the longest unused shards go, others' downloads are waited
        for. A single file larger than all of it takes what it needs, and so does one whose size nobody knew (`wait` False)."""
        while True:
            with self._counting():
                if self._evicted(part, need) or not wait:
                    os.ftruncate(file, need)  # its size is what counts
                    return
            time.sleep(0.05)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """The lock of the folder. A rename needs it too: a file that changes its name in the middle of a count is missed."""
        with open(self.folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _evicted(self, part: Path, need: int) -> bool:
        """Whether `need` bytes are free beside `part`, or could be made so."""
        shards, total, writing = [], need, False
        for entry in os.scandir(self._shards):
            if entry.name == part.name:
                continue
            with suppress(FileNotFoundError):
                stat = entry.stat()
                if entry.name.endswith(".tar"):
                    shards.append((stat.st_mtime_ns, stat.st_size, entry.path))
                elif _left(entry.path):
                    continue
                else:
                    writing = True
                total += stat.st_size
        for _, size, path in sorted(shards):
            if total <= self.size:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total <= self.size or not writing


def _same(path: Path, file: int) -> bool:
    """Whether the descriptor is of the file that has this name now."""
    try:
        return os.stat(path).st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _left(path: str) -> bool:
    """Remove a `.part` that nobody writes any more; False where somebody does."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same(Path(path), file):
            os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def home() -> Path:
    """Where caches and indexes of remote shards are where nothing else is said: TRILEVEL_CACHE, else ~/.cache/trilevel."""
    named = os.environ.get("TRILEVEL_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilevel"


def cache_at(folder: str | None, gib: float) -> Cache:
    """The cache of a configuration: `folder` may name environment variables ($TMPDIR); None: the default folder."""
    return Cache(Path(os.path.expanduser(os.path.expandvars(folder))) if folder else home(), int(gib * 2**30))
