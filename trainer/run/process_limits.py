"""Limits of the system that a run meets at once or never: open files and shared memory.

Past them loader workers, gloo, the rendezvous and Python's locks each fail with an error of their own, in the middle of a library.
"""

from __future__ import annotations

import multiprocessing
import os

from trainer.config.errors import ConfigError
from trainer.data.loader.shared_buffers import buffers_of

SHARED_MEMORY = "/dev/shm"
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
            f"shared memory: {error.strerror}; /dev/shm must be a writable file system (docker run --shm-size=24g)"
        ) from error


def check_shared_memory(workers: int, ranks: int, slots: int, size: int, row_bytes: int = 0, evaluated: int = 0) -> None:
    """Raises ConfigError where /dev/shm is smaller than the buffers of the loaders: written past its end, it ends a worker by SIGBUS.

    ranks: on this node, with `workers` each; slots: images of a rank's batch; size: their side in pixels; row_bytes: of a row that may be
    a JPEG, with `data.decode_on: device`; evaluated: images of evaluation or probe batches that a rank's workers hold ready, which come
    on top.
    """
    if not workers:
        return
    try:
        system = os.statvfs(SHARED_MEMORY)
    except OSError:  # not on Linux
        return
    free = system.f_bavail * system.f_frsize
    pixels = size * size * 3
    needed = ranks * (buffers_of(workers) * slots * (row_bytes or pixels) + evaluated * pixels)
    if needed > free:
        raise ConfigError(
            f"{SHARED_MEMORY}: {free / 2**30:.3g} GiB are free; data.workers={workers} on {ranks} process(es) of this node need "
            f"{needed / 2**30:.3g} GiB ({buffers_of(workers)} buffers of {slots} images of {size} px each, and {evaluated} "
            "images of an evaluation): enlarge it (docker run "
            f"--shm-size={-(-needed // 2**30) + 1}g), lower data.workers or evaluate.batch, or use more nodes"
        )


def few_cores(ranks: int) -> list[str]:
    """Fewer cores than processes on this node, as a sentence: Slurm's default is 1 core for the task that starts them all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores >= ranks:
        return []
    return [
        f"{ranks} processes of this node share {cores} core(s); give each data.workers + 1: `python -m launch slurm --cpus N`, or "
        "#SBATCH --cpus-per-task"
    ]


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
