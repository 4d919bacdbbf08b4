"""A memory cgroup, version 1 or 2, that a process is moved into while it runs, so that the kernel kills it for lack of memory."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Cgroup:
    def __init__(self, folder: Path) -> None:
        self.folder, self.first = folder, folder.parent == V1

    def hold(self, pid: int) -> None:
        """Count here what the process takes from now on."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def no_more(self) -> None:
        """From now on nothing more than it uses."""
        used = int((self.folder / ("memory.usage_in_bytes" if self.first else "memory.current")).read_text())
        (self.folder / ("memory.limit_in_bytes" if self.first else "memory.max")).write_text(str(max(used, 1 << 20)))

    def kills(self) -> int:
        """Processes that the kernel has killed for it."""
        text = (self.folder / ("memory.oom_control" if self.first else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])

    def squeeze(self, pid: int, waits: Callable[[], bool], seconds: float) -> None:
        """Leaves the process no more memory than it has until the kernel kills it, `waits` is False or `seconds` are over."""
        self.hold(pid)
        end = time.monotonic() + seconds
        while not self.kills() and waits() and time.monotonic() < end:
            with contextlib.suppress(OSError):  # busy: it just took more
                self.no_more()
            time.sleep(0.2)


@contextlib.contextmanager
def memory_cgroup() -> Iterator[Cgroup]:
    """An empty one, removed at the end. Raises OSError where none can be made."""
    parent = V1 if V1.is_dir() else V2
    folder = parent / f"trilevel-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        if not any((folder / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
            raise OSError(f"{parent}: no memory controller")
        yield Cgroup(folder)
    finally:
        with contextlib.suppress(OSError):
            for pid in (folder / "cgroup.procs").read_text().split():
                (parent / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            folder.rmdir()
