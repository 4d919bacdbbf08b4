"""A limit on memory around what a library makes of an answer or a file from others, without a limit of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """In the block this process can allocate about `extra` bytes more than it has now; then Python raises MemoryError.

    By RLIMIT_DATA, which Linux applies to all private memory; elsewhere there is no limit."""
    try:
        import resource

        before = resource.getrlimit(resource.RLIMIT_DATA)
        limit = psutil.Process().memory_info().data + extra
        if before[0] == resource.RLIM_INFINITY or limit < before[0]:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    except (ImportError, OSError, ValueError, AttributeError, psutil.Error):  # the last: /proc is not mounted
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
