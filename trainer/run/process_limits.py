"""Limits of the system that a run meets at once or never: open files and shared memory.

Past them loader workers, gloo, the rendezvous and Python's locks each fail with an error of their own, in the middle of a library.
"""

from __future__ import annotations

import multiprocessing

from trainer.config.errors import ConfigError

OPEN_FILES = 128  # one process without workers has about 50 files open
OPEN_FILES_EACH = 8  # more for each loader worker (pipes, queues) and for each rank (connections)


def check_limits(workers: int, world: int) -> None:
    """Raise this process's limit of open files where it is too low. Raises ConfigError where the system does not allow that, or has no
    shared memory. workers: of the loader; world: ranks."""
    _allow_open_files(workers, world)
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise ConfigError(
            f"shared memory: {error.strerror}; /dev/shm must be a writable file system (docker run --shm-size=16g)"
        ) from error


def _allow_open_files(workers: int, world: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    needed = OPEN_FILES + OPEN_FILES_EACH * (workers + world)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"open files: limit {hard} per process (ulimit -Hn); data.workers={workers} on {world} process(es) needs {needed}: raise the "
            "limit (docker run --ulimit nofile=4096), or lower data.workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
