"""The folder of a cache: DIR/trilevel-cache-1/{CACHEDIR.TAG, lock, HASH.tar, HASH.part}, HASH being 32 hex digits.

The cache creates this folder and marks it with CACHEDIR.TAG (bford.info/cachedir: backup programs skip such folders). It writes and
deletes only files of these names in a folder with this mark. Links are not followed: with write access to DIR another user could
otherwise plant a link and have other files overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.data.errors import StorageUnavailable

NAME = "trilevel-cache-1"
_MARK = "CACHEDIR.TAG"
_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n# made by trilevel, which deletes files [0-9a-f]{32}.tar and .part here\n"
)
_OURS = re.compile(r"[0-9a-f]{32}\.(tar|part)")
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a planted FIFO would block otherwise; regular files ignore it


def prepare(folder: Path) -> Path:
    """The cache's own folder below `folder`, created and marked if missing. Raises StorageUnavailable if a folder of that name was
    not created by the cache, OSError if the disk fails."""
    own = folder / NAME
    own.mkdir(parents=True, exist_ok=True)
    if _marked(own):
        return own
    _refuse_foreign(folder, own)
    with locked(own):
        if not _marked(own):
            _refuse_foreign(folder, own)
            (own / _MARK).unlink(missing_ok=True)  # empty: its writer was killed
            file = os.open(own / _MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o644)
            try:
                os.write(file, _TEXT)
            finally:
                os.close(file)
    return own


def _marked(own: Path) -> bool:
    if not stat.S_ISDIR(own.lstat().st_mode):
        raise OSError(errno.ELOOP, f"{own} is a link, not a folder; remove it")
    try:
        file = open_regular(own / _MARK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return os.read(file, len(_TEXT) + 1) == _TEXT
    finally:
        os.close(file)


def _refuse_foreign(folder: Path, own: Path) -> None:
    """Accept an empty folder, or one with only the lock and an empty mark. Raises StorageUnavailable otherwise."""
    found = sorted(set(os.listdir(own)) - {"lock"})
    with suppress(FileNotFoundError):
        if not found or (found == [_MARK] and not (own / _MARK).lstat().st_size):
            return
    if _marked(own):  # by another process, after the caller looked
        return
    raise StorageUnavailable(
        f"data.cache={folder}: {own} holds {found[0]!r} and has no {_MARK} written by trilevel, so nothing in it may be deleted; "
        "use another folder, or remove this one"
    )


def open_regular(path: Path | str, flags: int, mode: int = 0o666) -> int:
    """A descriptor of a regular file. Raises OSError for links and anything else that is not a regular file."""
    file = os.open(path, flags | _SAFE, mode)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, f"{path} is not a regular file; remove it")
    return file


def open_part(path: Path) -> int:
    """A descriptor for writing a file without other hard links: created, or left over from a killed process. Raises OSError."""
    while True:
        with suppress(FileExistsError):
            return open_regular(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with suppress(FileNotFoundError):  # renamed or removed meanwhile
            file = open_regular(path, os.O_RDWR)
            if os.fstat(file).st_nlink <= 1:
                return file
            os.close(file)
            raise OSError(errno.EMLINK, f"{path} has another hard link; remove it")


@contextmanager
def locked(own: Path) -> Iterator[None]:
    """The lock of the folder. Raises OSError."""
    file = open_regular(own / "lock", os.O_RDONLY | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def files(own: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The cache's files in its folder; files with other names are skipped."""
    for entry in os.scandir(own):
        if _OURS.fullmatch(entry.name):
            with suppress(FileNotFoundError):
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(about.st_mode):
                    yield Path(entry.path), about


def is_same(path: Path, file: int) -> bool:
    """Whether the path still names the file of this descriptor."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def remove_unfinished(path: Path) -> bool | None:
    """Remove a `.part` that no process is writing and return None. True: a process is writing it; False: another user's file."""
    try:
        file = open_regular(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_same(path, file):
            path.unlink()
        return None
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
