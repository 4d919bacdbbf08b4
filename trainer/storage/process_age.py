"""How long this process has lived, by a clock that is never set."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil


def since_start() -> float:
    """Seconds since this process started. A clock that is set meanwhile changes nothing where the system has /proc."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, starttime: since the boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return max(0.0, time.time() - psutil.Process().create_time())
