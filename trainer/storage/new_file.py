"""A new file under a name that may be taken: a left-over of a killed process, or a link that somebody planted in a shared folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def open_new(path: Path) -> BinaryIO:
    """A file that did not exist before, to write; what had its name is removed, and a link is not followed. Raises OSError."""
    path.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")
