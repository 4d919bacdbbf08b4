"""Openers for the files of a run (`open(..., opener=regular)`): a link or FIFO that another user put there is refused, not followed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat


def regular(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """A descriptor of a regular file. Raises OSError for a symbolic link, and for anything else that is not a regular file."""
    try:
        handle = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a symbolic link, which is not followed; remove it", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is not a regular file; remove it", str(path))
    return handle


def private(path: str, flags: int) -> int:
    """As `regular`, with mode 0600, also of a file that was there: for what may hold a credential after all."""
    handle = regular(path, flags, 0o600)
    with contextlib.suppress(OSError):  # a file of another user
        os.fchmod(handle, 0o600)
    return handle
