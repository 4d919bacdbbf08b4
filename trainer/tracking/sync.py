"""MLflow, from a process beside the training: it tails the journal and sends it on. The training writes the journal, no more.

    shipper.start(run_dir, settings) -> Shipper     in the training, after the start line is written
    Shipper.finish() -> SyncResult                     at its end: waits a little, never hangs
    sync(run_dir) -> SyncResult                        the same shipping, run to the end by hand (`trilevel sync RUN`)

**Nothing twice.** MLflow keeps a row for every call, so a (key, step) sent twice shows twice. RUN/mlflow.json holds the MLflow
run, how far the journal is sent and the last step of every key; it is written after each batch. A step at or below that last
one is not sent: what a killed attempt logged and its successor does again (the same values: docs/laws.md, law 2) stays as it was seen
first; the journal has both. After a start and after every failure MLflow itself is asked for the last steps, so a batch that
arrived without our hearing of it counts as sent. One shipper per run: it locks the run directory.

**Nothing lost.** A server that is down, slow or answers 500 makes the shipper wait (1 to 10 s), the training nothing. When the
training is gone the shipper has `linger` seconds to bring the rest; what is left then is for `sync`.

**Never a hang.** Requests have a timeout (3 s at first, longer where a server proves slow). The shipper ignores the signals
that are meant for the training and ends by itself, by an alarm if need be.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from trainer.journal.file import JournalError
from trainer.tracking.mlflow_client import RunDeleted, timeout
from trainer.tracking.state import SyncResult
from trainer.tracking.upload import JournalUploader

TIMEOUTS = (3, 60)  # seconds of a request, at first and at most
WAIT = 10.0  # seconds between tries at most, from 1 on; less for a shipper that looks often


def sync(directory: Path | str, patience: float = 60.0) -> SyncResult:
    """Bring all of a run's journal to MLflow, as far as it is not there; give up after `patience` seconds without progress.

    Raises JournalError where there is no journal, or no start line in it.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        raise JournalError(f"{directory}: no such run; give the directory of a run, e.g. runs/NAME")
    with _only_shipper(directory, lambda: False) as alone:
        if not alone:
            return SyncResult(False, f"{directory}: a shipper is at work on this run; try again when it is done")
        return _drive(JournalUploader(directory), lambda _: False, every=0.0, patience=patience, by_hand=True)


def _drive(
    shipment: JournalUploader, wait: Callable[[float], bool], every: float, patience: float, by_hand: bool
) -> SyncResult:
    """Ship until `wait` (sleeps, False once the run is over) and then until all is sent or patience is at an end.

    Patience is counted from the end of the run, by hand from the last progress.
    """
    directory, alive, limit, ends, failures = shipment.directory, True, math.inf, math.inf, 0
    timeout(TIMEOUTS[0])
    while True:
        if alive and not wait(0.0):
            alive, limit, ends = False, shipment.size, time.monotonic() + patience
        began = time.monotonic()
        try:
            busy = shipment.send_batch(limit)
            if not busy and not alive:
                shipment.upload()
                if shipment.size == limit:  # else another attempt has begun
                    shipment.mark_killed(by_hand)
                return SyncResult(True, f"MLflow has all of it ({shipment.uri})")
            if not busy:
                shipment.upload(first=True)
            failures = 0
            if busy and by_hand:
                ends = time.monotonic() + patience
        except RunDeleted as error:
            shipment.failed(error)
            return SyncResult(False, str(error))
        except Exception as error:
            busy, failures = False, failures + 1
            shipment.failed(error)
            if time.monotonic() - began > 0.9 * timeout():
                timeout(min(TIMEOUTS[1], 2 * timeout()))
        if time.monotonic() > ends:
            kept = f"{limit - shipment.state.offset:,.0f} bytes of the journal are not there"
            return SyncResult(
                False, f"gave up on MLflow for now ({shipment.state.trouble}): {kept}; later: trilevel sync {directory}"
            )
        if not busy:
            pause = min(WAIT, max(1.0, 10 * every), 2.0 ** (failures - 1)) if failures else every
            if alive:
                wait(pause)
            else:
                time.sleep(max(0.0, min(pause, 2.0, ends - time.monotonic())))


def follow(directory: Path, parent: int, every: float, linger: float) -> SyncResult:
    """Ship while the process `parent` lives and has not said "stop" on our standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the training: it ends, then we do
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(10)
    over, listening, ours = False, True, os.getppid() == parent

    def wait(seconds: float) -> bool:
        nonlocal over, listening
        until = time.monotonic() + seconds
        while not over:
            nap = min(1.0, max(0.0, until - time.monotonic()))
            if listening and select.select([0], [], [], nap)[0]:
                said = os.read(0, 100)
                over, listening = b"stop" in said, bool(said)
            elif not listening:
                time.sleep(nap)
            over = over or not (os.getppid() == parent if ours else _lives(parent))
            if time.monotonic() >= until:
                break
        if over:
            signal.alarm(math.ceil(linger) + 30)  # the last word, whatever a library does
        return not over

    with _only_shipper(directory, lambda: wait(0.5)) as alone:
        if not alone:
            return SyncResult(False, f"another shipper works on {directory}")
        return _drive(JournalUploader(directory), wait, every, linger, by_hand=False)


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def _only_shipper(directory: Path, wait: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock of the run directory, or give up when `wait` (sleeps) says so; yields which. A predecessor may linger."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        have = False
        while not have:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                have = True
            except BlockingIOError:
                if not wait():
                    break
            except OSError:  # a file system without locks
                have = True
        yield have
    finally:
        os.close(handle)
