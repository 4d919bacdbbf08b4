"""The ranks of a node compile each graph once: the first one compiles, the others find its code in the cache of torch.compile.

torch.compile keeps compiled graphs in a folder, but ranks that start together all look into it before any has written, so each compiles
everything. Here a lock per node is held around inductor's compilation of one graph, including its look into the folder. Its order over the
graphs is free, and nothing inside communicates, so ranks can't wait for each other in a circle; the kernel releases the lock of a rank that
dies. Where that does not hold (`why_apart`), each rank compiles for itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

EVERY = 0.05  # s between two attempts to take the lock
# Settings of torch._inductor.config, off by default, with which a rank that compiles waits for the others, which would wait for its lock:
# they gather what each has measured or compiled. torch 2.11 has no `spmd_check`.
COMMUNICATE = (
    "distributed_max_autotune_gemm",
    "aten_distributed_optimizations.spmd_check",
    "aten_distributed_optimizations.enable_overlap_scheduling",
    "reorder_for_compute_comm_overlap",
)


def why_apart() -> str:
    """Why the ranks of a node can't compile one after the other with this torch, as it is set; empty where they can."""
    from torch._inductor import compile_fx, config

    if not callable(getattr(compile_fx, "_compile_fx_inner", None)):
        return f"torch {torch.__version__} has no torch._inductor.compile_fx._compile_fx_inner, around which the lock is held"
    for name in COMMUNICATE:
        with contextlib.suppress(AttributeError):
            if attrgetter(name)(config):
                return f"torch._inductor.config.{name} makes ranks communicate while they compile; set it to False to share the work"
    return ""


def share_compiling(folder: str, limit: float) -> None:
    """From now on this process compiles a graph only while it holds the lock of this node, a file in `folder`. limit: seconds that it waits
    for the other ranks, then it compiles beside them; 0: without limit."""
    from torch._inductor import compile_fx

    path = Path(folder) / f"compiling-{socket.gethostname()}.lock"  # a folder on a shared file system has one for each node
    compile_graph = getattr(compile_fx._compile_fx_inner, "alone", compile_fx._compile_fx_inner)

    def one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with locked(path, limit):
            return compile_graph(*args, **kwargs)

    one_at_a_time.alone = compile_graph  # type: ignore[attr-defined]
    # `compile_fx(inner_compile=)` would need a backend of its own at each torch.compile, and torch's modes are of its own backend only
    compile_fx._compile_fx_inner = one_at_a_time  # type: ignore[assignment]


@contextlib.contextmanager
def locked(path: Path, limit: float) -> Iterator[bool]:
    """Hold the lock of a file during the block; False where that was not possible: after `limit` seconds, or on a file system that refuses
    (it can't be written, or has no locks), which is a warning. A lock only saves time, so the block runs all the same."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _warn(path, error)
        yield False
        return
    try:
        yield _taken(file, path, limit)
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # by itself closing would leave it to a process forked meanwhile
        os.close(file)


def _taken(file: int, path: Path, limit: float) -> bool:
    end = time.monotonic() + limit if limit else float("inf")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                _warn(path, error)
                return False
        if time.monotonic() >= end:
            return False
        time.sleep(EVERY)


def _warn(path: Path, error: OSError) -> None:
    warnings.warn(
        f"{path}: {error.strerror}: each rank of this node compiles every graph; set TORCHINDUCTOR_CACHE_DIR to a folder that can be "
        "written and locked",
        stacklevel=2,
    )
