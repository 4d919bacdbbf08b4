"""A container without /proc: psutil finds no process, not even this one. A run starts all the same."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from trainer.config.schema_run import EngineConfig
from trainer.data.order import BatchSplit
from trainer.engine import engine as module
from trainer.engine.engine import Engine
from trainer.engine.processes import Processes
from trainer.run.description import environment
from trainer.storage import process_age
from trainer.storage.memory_limit import memory_limit
from trainer.telemetry.hardware import Node
from trainer.telemetry.timing import cpu_seconds


def missing(pid: int | None = None) -> Any:
    raise psutil.NoSuchProcess(pid or os.getpid())


def unreadable() -> Any:
    raise FileNotFoundError(2, "No such file or directory", "/proc/stat")


@pytest.fixture(autouse=True)
def no_proc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "Process", missing)
        for name in ("cpu_percent", "virtual_memory", "net_io_counters"):
            patch.setattr(psutil, name, unreadable)
        patch.setattr(process_age, "Path", lambda name: name)  # text has no `read_text`: AttributeError
        yield


def test_the_age_is_that_of_the_trainers_modules() -> None:
    first = process_age.since_start()
    assert 0 < first <= process_age.since_start() < first + 60


def test_the_block_runs_without_a_limit_of_memory() -> None:
    with memory_limit(1):
        assert len(bytearray(1 << 22)) == 1 << 22


def test_cpu_time_is_that_of_this_process() -> None:
    before = cpu_seconds()
    sum(range(1_000_000))
    assert before < cpu_seconds() < before + 60


def test_the_load_of_the_node_is_left_out() -> None:
    assert Node().load() == {} and "memory unknown\n" in environment()


def test_an_engine_that_failed_to_start_closes_nothing_at_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit of the process showed an AttributeError below the cause."""
    registered: list[Any] = []

    def fails(*_: object) -> None:
        raise psutil.NoSuchProcess(1)

    accelerator = SimpleNamespace(num_processes=1, process_index=0, device="cpu")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator)
    monkeypatch.setattr(module, "world_size", lambda: 1)
    monkeypatch.setattr(module, "set_single_process_env", lambda: None)
    monkeypatch.setattr(Processes, "__init__", fails)
    monkeypatch.setattr(atexit, "register", registered.append)
    with pytest.raises(psutil.NoSuchProcess):
        Engine(EngineConfig(kind="ddp"), BatchSplit(2, 1, 2))
    assert not [one for one in registered if isinstance(getattr(one, "__self__", None), Engine)]
