"""Whether a cached file still has the bytes of its shard: hashed once per run and node, before its first use.

Disks fail, and other programs write files of the same size. A file's mtime is the time when its bytes were last written or hashed, its
atime that of its last use; so the processes of a run share what one of them found. A file of another user keeps its mtime: each
process hashes it once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field

_PIECE = 4 << 20  # bytes hashed at a time


@dataclass
class CacheCheck:
    """since: start of the run in seconds (time.time); a file hashed before it is hashed again."""

    since: float = field(default_factory=time.time)
    _hashed: set[tuple[int, int]] = field(default_factory=set)  # (device, inode), by this process

    def is_known(self, file: int, size: int) -> bool:
        """Whether the file has this size and its bytes were hashed since the start of the run."""
        about = os.fstat(file)
        hashed = self.since <= about.st_mtime <= time.time() + 1 or (about.st_dev, about.st_ino) in self._hashed
        return hashed and about.st_size == size

    def has(self, file: int, size: int, whole: str) -> bool:
        """Whether the file has this size and hash. Raises OSError."""
        if os.fstat(file).st_size != size or self.is_known(file, size):
            return os.fstat(file).st_size == size
        with suppress(OSError):  # one process hashes, the others wait; NFS does not lock a file opened for reading
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if self.is_known(file, size):
                return True
            digest, at = hashlib.blake2b(digest_size=16), 0
            while piece := os.pread(file, _PIECE, at):
                digest.update(piece)
                at += len(piece)
            if digest.hexdigest() != whole:
                return False
            with suppress(OSError):
                os.utime(file)
            about = os.fstat(file)
            self._hashed.add((about.st_dev, about.st_ino))
            return True
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def record_use(file: int) -> None:
    """Set atime and keep mtime. A file of another user stays as it is."""
    with suppress(OSError):
        os.utime(file, ns=(time.time_ns(), os.fstat(file).st_mtime_ns))
