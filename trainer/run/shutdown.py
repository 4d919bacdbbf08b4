"""When a run is asked to end before its time: by a signal, by a save that failed, or because its launcher is gone.

Any rank may be asked; all of them agree in the step they are in, or between two batches of an evaluation (see `train`), save, and
end with exit code 75, which schedulers requeue on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from trainer.data.errors import StorageUnavailable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LOOK = 1.0  # seconds between two looks at the launcher
DATA_GRACE = 20.0  # seconds that a run that was asked to stop waits for a batch; schedulers kill after 30 or more
STARTED_BY = (
    "TORCHELASTIC_RUN_ID",
    "ACCELERATE_MIXED_PRECISION",
    "TRILEVEL_EXIT_FILE",
)  # what launchers leave in the environment


class Stop:
    """Asked for once, never taken back. No lock, as an Event has: a signal's handler that interrupts `request` would wait for itself."""

    def __init__(self) -> None:
        self._asked = self._waiting = False

    def request(self) -> None:
        self._asked = True
        self._limit()

    def requested(self) -> bool:
        return self._asked

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the wait for a batch. Raises StorageUnavailable where none comes within DATA_GRACE seconds of the request: ranks
        agree to stop in a step, and a step needs a batch."""
        self._waiting = True
        self._limit()
        try:
            yield
        finally:
            self._waiting = False
            if self._asked and threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _limit(self) -> None:
        """Start the clock: the alarm interrupts whatever the main thread waits in."""
        if self._asked and self._waiting and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, self._late)
            signal.setitimer(signal.ITIMER_REAL, DATA_GRACE)

    def _late(self, _number: int, _frame: Any) -> None:
        if self._waiting:
            raise StorageUnavailable(
                f"no batch arrived within {DATA_GRACE:g} s after the run was asked to stop: it ends without a checkpoint of its last "
                "steps; --resume continues from the newest checkpoint"
            )


def install_handlers() -> Stop:
    """Asked for by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2, or by the end of the launcher. A second signal changes nothing, but a second
    SIGINT (Ctrl-C) ends at once."""
    stop = Stop()

    def heard(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and stop.requested():
            raise KeyboardInterrupt
        stop.request()

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, heard)
    if above := launchers():
        threading.Thread(target=_watch, args=(above, stop), name="launcher watch", daemon=True).start()
    return stop


def ignore_signals() -> None:
    """A run that is over has nothing to stop. Python puts the default handlers back on its way out: a signal that is repeated then
    (our launcher repeats Slurm's after 5 s) would kill the rank and make a failure of a run that has saved and ended."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def launchers() -> list[int]:
    """The processes above this one whose end must end it, the nearest first: torchrun or accelerate, and `python -m launch` above
    them. Empty where a person started the rank: a run outlives its terminal."""
    if not any(name in os.environ for name in STARTED_BY):
        return []
    parent = os.getppid()
    return [parent, _parent_of(parent)] if "TRILEVEL_EXIT_FILE" in os.environ else [parent]


def _watch(above: list[int], stop: Stop) -> None:
    """A killed launcher can't tell its ranks. The kernel gives its children another parent at once, even while nobody buries it."""
    while [os.getppid(), *([_parent_of(above[0])] if len(above) > 1 else [])] == above:
        time.sleep(LOOK)
    stop.request()


def _parent_of(process: int) -> int:
    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return -1
