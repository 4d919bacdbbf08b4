"""Limits of the system end a run at its begin, by name and with a remedy, not in the middle of a library."""

from __future__ import annotations

import multiprocessing
import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config.errors import ConfigError
from trainer.data.errors import StorageUnavailable
from trainer.data.loader.shared_buffers import BufferPool
from trainer.run.process_limits import check_limits, check_shared_memory, few_cores

NEEDED = 128 + 8 * (2 + 1)  # two workers, one rank


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to"),
    [
        (NEEDED, NEEDED, None),
        (4096, 4096, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
        (64, NEEDED, NEEDED),
        (NEEDED - 1, 4096, NEEDED),
        (64, resource.RLIM_INFINITY, NEEDED),
    ],
)
def test_a_low_limit_of_open_files_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised_to: int | None
) -> None:
    changed: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: changed.append((what, limits)))
    check_limits(workers=2, world=1)
    assert changed == ([] if raised_to is None else [(resource.RLIMIT_NOFILE, (raised_to, hard))])


def test_a_hard_limit_of_open_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `ulimit -n 32` torch's loader failed while it closed itself, with 40 the rendezvous, with 48 gloo."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, NEEDED - 1))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("more than is allowed"))
    with pytest.raises(
        ConfigError, match=rf"limit {NEEDED - 1} .*data.workers=2 on 1 process.* needs {NEEDED}: raise the limit"
    ):
        check_limits(workers=2, world=1)


def test_a_shared_memory_that_is_read_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(multiprocessing, "Lock", fails)
    with pytest.raises(ConfigError, match=r"shared memory: Read-only file system; /dev/shm must be a writable .*--shm-size"):
        check_limits(workers=0, world=1)


@pytest.mark.parametrize(
    "error", [RuntimeError("unable to allocate shared memory(shm): No space left"), OSError(30, "Read-only")]
)
def test_a_shared_memory_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(_: int) -> None:
        raise error

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", fails)
    message = r"shared memory for a batch of 64 images of 224 px \(9.19 MiB\): .*(No space left|Read-only).*data.workers=0"
    with pytest.raises(StorageUnavailable, match=message):
        BufferPool(7, 64, 224)


def test_a_shared_memory_smaller_than_the_loaders_buffers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 ranks x 33 buffers x 256 images of 224 px: written past its end, /dev/shm ends a worker by SIGBUS in the middle of an epoch."""
    images = 256 * 224 * 224 * 3
    fits = SimpleNamespace(f_bavail=8 * 31 * images, f_frsize=1)
    monkeypatch.setattr("os.statvfs", lambda path: fits if path == "/dev/shm" else pytest.fail(path))
    check_shared_memory(workers=14, ranks=8, slots=256, size=224)
    check_shared_memory(workers=0, ranks=99, slots=256, size=224)  # decodes in the rank
    with pytest.raises(
        ConfigError,
        match=r"/dev/shm: 8\.9 GiB are free; data\.workers=15 on 8 process\(es\) of this node need 9\.47 GiB \(33 buffers of 256 images .*"
        r"--shm-size=11g\), lower data\.workers",
    ):
        check_shared_memory(workers=15, ranks=8, slots=256, size=224)
    with pytest.raises(ConfigError, match=r"need 16\.9 GiB \(31 buffers .* and 7168 images of an evaluation\)"):
        check_shared_memory(workers=14, ranks=8, slots=256, size=224, evaluated=2 * 14 * 256)


def test_fewer_cores_than_processes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    assert few_cores(8) == [
        "8 processes of this node share 1 core(s); give each data.workers + 1: `python -m launch slurm --cpus N`, or #SBATCH "
        "--cpus-per-task"
    ]
    assert few_cores(1) == []
