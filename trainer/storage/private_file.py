"""Files that only their owner reads, for what may hold a credential after all."""

from __future__ import annotations

import contextlib
import os


def private(path: str, flags: int) -> int:
    """For `open(..., opener=private)`: mode 0600, also of a file that was there."""
    handle = os.open(path, flags | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # a file of another user
        os.fchmod(handle, 0o600)
    return handle
