"""Whether another process of this machine has ended, and by which signal."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def process_space() -> int:
    """Identifies the process ids of this container, 0 where the system does not: equal ids in two containers are two processes."""
    with suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def how_ended(pid: int) -> str:
    """ "" while the process runs, or where the system does not know; else "has ended", or how, as long as its parent has not read that."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "has ended" if Path("/proc/self/stat").exists() else ""
    except OSError:
        return ""
    if fields[0] not in ("Z", "X"):
        return ""
    status = int(fields[49])  # field 52, exit_code
    return f"was killed by {name_of(status & 127)}" if status & 127 else f"has ended with exit code {status >> 8}"


def name_of(number: int) -> str:
    """Of a signal, e.g. SIGKILL."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
