"""Requests to end a run early: a signal, a failed checkpoint, or a launcher that has exited.

Any rank may receive the request; all ranks agree on it in the current step, or between two batches of an evaluation (see `train`),
save a checkpoint and exit with code 75, on which schedulers can requeue.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from trainer.data.errors import StorageUnavailable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL = 1.0  # seconds between two checks of the launcher
DATA_GRACE = 20.0  # seconds to wait for a batch after a stop was requested; schedulers kill after 30 or more
STARTED_BY = (
    "TORCHELASTIC_RUN_ID",
    "ACCELERATE_MIXED_PRECISION",
    "TRILEVEL_EXIT_FILE",
)  # variables that launchers set


class Stop:
    """A flag that is set once. Not a threading.Event: its lock would deadlock a signal handler that interrupts `request`."""

    def __init__(self) -> None:
        self._requested = self._waiting = False

    def request(self) -> None:
        self._requested = True
        self._limit()

    def requested(self) -> bool:
        return self._requested

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the wait for a batch. Raises StorageUnavailable if none arrives within DATA_GRACE seconds of the request: ranks
        agree to stop during a step, and a step needs a batch."""
        self._waiting = True
        self._limit()
        try:
            yield
        finally:
            self._waiting = False
            if self._requested and threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _limit(self) -> None:
        """Start the timer: its signal interrupts any wait of the main thread."""
        if self._requested and self._waiting and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, self._late)
            signal.setitimer(signal.ITIMER_REAL, DATA_GRACE)

    def _late(self, _number: int, _frame: Any) -> None:
        if self._waiting:
            raise StorageUnavailable(
                f"no batch arrived within {DATA_GRACE:g} s after a stop was requested: the run ends without a checkpoint of its last "
                "steps; --resume continues from the newest checkpoint"
            )


def install_handlers() -> Stop:
    """A Stop that is requested by one of SIGNALS, or by the exit of the launcher. Further signals have no effect, except that a second
    SIGINT (Ctrl-C) ends the process immediately. SIGHUP, which comes when a terminal closes, stays ignored under nohup."""
    stop = Stop()

    def on_signal(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and stop.requested():
            raise KeyboardInterrupt
        stop.request()

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, on_signal)
    if above := launchers():
        threading.Thread(target=_watch, args=(above, stop), name="launcher watch", daemon=True).start()
    return stop


def ignore_signals() -> None:
    """Call after the run has ended. Python restores the default handlers while it exits: a repeated signal (`launch` repeats Slurm's
    after 5 s) would then kill the rank, and a run that has saved and ended would count as failed."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def end_process(code: int) -> None:
    """Call as the last statement of a rank whose run has ended. With other ranks the process ends here, after its exit handlers and without
    finalizing the interpreter: DeepSpeed refers to its process groups until then, and a thread of theirs that wants the interpreter
    afterwards aborts the process (pytorch#190489), so that torchrun counts a finished run as failed. Observed once, with gloo on a loaded
    machine: "terminate called without an active exception"."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def launchers() -> list[int]:
    """Process ids of the ancestors whose exit must end this run, nearest first: torchrun or accelerate, then `python -m launch`.
    Empty if the rank was started without a launcher: a run under nohup or setsid then outlives its terminal."""
    if not any(name in os.environ for name in STARTED_BY):
        return []
    parent = os.getppid()
    return [parent, _parent_of(parent)] if "TRILEVEL_EXIT_FILE" in os.environ else [parent]


def _watch(above: list[int], stop: Stop) -> None:
    """A killed launcher can't signal its ranks, but the kernel gives them another parent at once, before the zombie is reaped."""
    while [os.getppid(), *([_parent_of(above[0])] if len(above) > 1 else [])] == above:
        time.sleep(POLL)
    stop.request()


def _parent_of(process: int) -> int:
    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return -1
