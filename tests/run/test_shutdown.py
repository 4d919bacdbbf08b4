"""A run ends after a stop signal, even while no batch arrives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.conftest import environment
from trainer.data.errors import StorageUnavailable
from trainer.run import shutdown
from trainer.run.shutdown import Stop, install_handlers


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stop]:
    numbers = (*shutdown.SIGNALS, signal.SIGALRM)
    before, left = [signal.getsignal(n) for n in numbers], signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's
    monkeypatch.setattr(shutdown, "DATA_GRACE", 0.3)
    yield install_handlers()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    signal.setitimer(signal.ITIMER_REAL, *left)


ABORTING = """
import atexit, os, sys, types
from trainer.run.shutdown import end_process

class Late:
    def __del__(self, abort=os.abort):  # while the interpreter is finalized, as a thread of a library might
        abort()

sys.modules["late"] = types.ModuleType("late")
sys.modules["late"].one = Late()
atexit.register(print, "exit handlers ran")
print("run ended")
end_process(75)
"""


@pytest.mark.parametrize(("world", "code"), [("2", 75), ("1", -signal.SIGABRT)])
def test_a_rank_whose_libraries_abort_while_python_exits_keeps_its_exit_code(world: str, code: int) -> None:
    """Without other ranks Python exits as ever, so that a profiler or a debugger around it does too."""
    ended = subprocess.run(
        [sys.executable, "-c", ABORTING], env=environment() | {"WORLD_SIZE": world}, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == code, ended.stderr
    if world == "2":
        assert ended.stdout.splitlines() == ["run ended", "exit handlers ran"]


@pytest.mark.parametrize("when", ["before the wait", "in the wait"])
def test_a_wait_for_data_ends_after_a_signal(stop: Stop, when: str) -> None:
    """Neither a lock nor a sleep of the main thread holds it."""
    if when == "before the wait":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"no batch arrived within 0.3 s after .* --resume"), stop.waiting_for_data():
        threading.Event().wait(20)
    assert stop.requested() and 0.25 < time.monotonic() - began < 5


def test_a_batch_in_time_stops_the_clock(stop: Stop) -> None:
    with stop.waiting_for_data():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    time.sleep(0.5)
    assert stop.requested() and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_wait_without_a_signal_has_no_limit(stop: Stop) -> None:
    with stop.waiting_for_data():
        time.sleep(0.5)


@pytest.mark.parametrize("nohup", [False, True])
def test_sighup_stops_a_run_except_under_nohup(stop: Stop, nohup: bool) -> None:
    """It comes when a terminal closes; its default action would kill the run without a checkpoint."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    again = install_handlers()
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.01)
    assert again.requested() != nohup


def test_a_second_signal_changes_nothing_but_a_second_ctrl_c_ends_at_once(stop: Stop) -> None:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert stop.requested()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
