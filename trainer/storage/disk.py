"""Durable file operations: writes that are on disk when they return, renames, and the syncs that make names durable.

All of them use a few system calls of `system`: tests substitute a simulated disk, which can fail at any call, or lose unsynced
data at a crash, in any order that POSIX allows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

CHUNK = 16 << 20  # bytes per system call
SYNC = 256 << 20  # bytes after which a file is synced: the sync at its end is short then, on a slow disk too
WRITING = ".writing-"  # how the name of a file begins that `atomic_write` has not finished


class _Progress:
    bytes = 0


def written_bytes() -> int:
    """Bytes that this process has written to disk, or read to hash them, so far: whether a write gets on."""
    return _Progress.bytes


def counted(pieces: Iterable[Any]) -> Iterator[Any]:
    """The pieces of a file, each counted as written once the next one is asked for."""
    for piece in pieces:
        yield piece
        _Progress.bytes += len(piece)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file that appears as `path` when the block ends: after a crash it is whole, or what was there before. An error in the block,
    or an OSError here, leaves what was there. Several processes may write the same path, the last one wins."""
    path, disk = Path(path), Disk()
    # random: containers on several nodes have the same process ids, and often the same host name
    partial = path.with_name(f"{WRITING}{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:  # follows no link that someone put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        disk.rename(partial, path)
        disk.sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by `text`, see `atomic_write`. Raises OSError."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


class Content(NamedTuple):
    """A file's length and its BLAKE2b hash (16 bytes, hexadecimal)."""

    size: int
    hash: str


class Disk:
    """Operations on files and folders through `system` (the module `os`, or a substitute). Every method may raise OSError."""

    def __init__(self, system: Any = os):
        self._os = system

    def make_folder(self, path: Path) -> None:
        self._os.mkdir(path)

    def write(self, path: Path, pieces: Iterable[Any]) -> Content:
        """Write a file from `pieces` (bytes or buffers), on disk when this returns; its name is durable after `sync` of the folder."""
        size, unsynced, hashed = 0, 0, hashlib.blake2b(digest_size=16)
        handle = self._os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for piece in pieces:
                whole = memoryview(piece)
                for start in range(0, len(whole), CHUNK):
                    part = whole[start : start + CHUNK]
                    size += len(part)
                    hashed.update(part)
                    while len(part):
                        count = self._os.write(handle, part)
                        part, unsynced = part[count:], unsynced + count
                        _Progress.bytes += count
                    if unsynced >= SYNC:
                        self._os.fsync(handle)
                        _Progress.bytes, unsynced = _Progress.bytes + 1, 0
            self._os.fsync(handle)
        finally:
            self._os.close(handle)
        return Content(size, hashed.hexdigest())

    def rename(self, old: Path, new: Path) -> None:
        """Rename atomically; durable after `sync` of the folder."""
        self._os.replace(old, new)

    def sync(self, folder: Path) -> None:
        """Sync a folder: its names are on disk when this returns."""
        handle = self._os.open(folder, os.O_RDONLY, 0)
        try:
            self._os.fsync(handle)
        finally:
            self._os.close(handle)

    def remove(self, path: Path) -> None:
        """Delete a file, or a folder with its content, if it exists."""
        try:
            self._os.unlink(path)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            for name in self.names(path):
                self.remove(path / name)
            self._os.rmdir(path)

    def names(self, folder: Path) -> list[str]:
        """File names in a folder, sorted; empty if it does not exist."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(self._os.listdir(folder))
        return []

    def size(self, path: Path) -> int:
        """Bytes of a regular file, -1 where there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            facts = self._os.stat(path)
            if stat.S_ISREG(facts.st_mode):
                return int(facts.st_size)
        return -1

    def read(self, path: Path) -> bytes:
        return b"".join(self._chunks(path))

    def content(self, path: Path) -> Content:
        """Length and hash of a file, from its current content."""
        size, hashed = 0, hashlib.blake2b(digest_size=16)
        for chunk in self._chunks(path):
            size += len(chunk)
            hashed.update(chunk)
        return Content(size, hashed.hexdigest())

    def _chunks(self, path: Path) -> Iterable[bytes]:
        if not stat.S_ISREG(self._os.stat(path).st_mode):  # a FIFO would wait for a writer
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        handle = self._os.open(path, os.O_RDONLY | os.O_NONBLOCK, 0)
        try:
            while chunk := self._os.read(handle, CHUNK):
                _Progress.bytes += len(chunk)
                yield chunk
        finally:
            self._os.close(handle)
