"""How long this process has lived, by a clock that is never set."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

_IMPORTED = time.monotonic()


def since_start() -> float:
    """Seconds since this process started. A clock that is set meanwhile changes nothing where the system has /proc. On a Linux where it
    is not mounted: seconds since the import of this module, which is less."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, starttime: since the boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    try:
        return max(0.0, time.time() - psutil.Process().create_time())
    except psutil.Error:
        return time.monotonic() - _IMPORTED
