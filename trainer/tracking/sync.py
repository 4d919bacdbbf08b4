"""Upload to MLflow from a process beside the training, which follows the journal. The training itself only writes the journal.

    shipper.start(run_dir, settings) -> Shipper     in the training, after the start line is written
    Shipper.finish() -> SyncResult                     at its end: waits a limited time
    sync(run_dir) -> SyncResult                        the same upload by hand (`trilevel sync RUN`)

**No duplicates.** MLflow stores a row per call, so a (key, step) sent twice appears twice. RUN/mlflow.json has the MLflow run, the
offset up to which the journal is sent and the last step of every key; it is written after each batch. Steps at or below that last
one are not sent: of steps that a killed attempt logged and its successor repeats (the same values: docs/laws.md, law 2) MLflow
keeps the first, the journal has both. At the start and after every failure the last steps are read from MLflow, so a batch that
arrived although its request failed counts as sent. One shipper per run: it locks the run directory.

**No losses.** If a server is down, slow or answers 500, the shipper waits (1 to 10 s) and training is not affected. After the end
of training the shipper has `linger` seconds for the rest; `sync` uploads what is left then.

**No hangs.** Requests have a timeout (3 s at first, longer for slow servers). The shipper ignores the signals meant for the
training and exits by itself, at the latest by an alarm.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from trainer.data.progress import progress_bar
from trainer.journal.file import JournalError
from trainer.storage.memory_limit import memory_limit
from trainer.tracking.address import credential, refuse_unnamed
from trainer.tracking.mlflow_client import ANSWER, RunDeleted, load_library, timeout
from trainer.tracking.state import SyncResult
from trainer.tracking.upload import JournalUploader

TIMEOUTS = (3, 60)  # seconds of a request, at first and at most
GRACE = 30.0  # seconds beyond its patience after which `sync` gives up a request that has not ended
RATE = 2**18  # bytes per second of files that `sync` allows for on top of it
WAIT = 10.0  # seconds between tries at most, from 1 on; less for a shipper that looks often


def sync(directory: Path | str, patience: float = 60.0) -> SyncResult:
    """Upload the part of a run's journal that MLflow does not have yet; gives up after `patience` seconds without progress.

    Raises JournalError without a journal, or without a start line in it.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        raise JournalError(f"{directory}: no such run; give the directory of a run, e.g. runs/NAME")
    with _only_shipper(directory, lambda: False) as alone:
        if not alone:
            return SyncResult(
                False,
                f"{directory}: another process is uploading this run, which goes on for up to a minute after the run; try again then",
            )
        given = credential()
        uploader = JournalUploader(directory)
        refuse_unnamed(uploader.address, directory, given)
        with progress_bar("upload", max(0, uploader.size - uploader.state.offset), "bytes of the journal") as progress:
            return _drive(
                uploader, lambda _: False, 0.0, patience, by_hand=True, sent=partial(progress.advance, progress.task_ids[0])
            )


class _Late(Exception):
    """A request that took longer than its deadline, whatever its library waits for: a server may send a byte a second."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _Late in the block after `seconds`, where signals can (the main thread of a `trilevel sync`)."""
    if seconds == math.inf or threading.current_thread() is not threading.main_thread():
        yield
        return

    over = False

    def late(*_: object) -> None:
        if not over:
            raise _Late(f"no end of an answer after {seconds:.0f} s: does the server, or a proxy before it, hang?")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again every second: a library may swallow the first
    try:
        try:
            yield
        finally:
            over = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _drive(
    shipment: JournalUploader,
    wait: Callable[[float], bool],
    every: float,
    patience: float,
    by_hand: bool,
    sent: Callable[[float], None] = lambda _: None,
) -> SyncResult:
    """Upload until `wait` (sleeps; False once the run has ended) and then until all is sent or `patience` seconds have passed.

    shipment: the uploader of the run.
    every: seconds between two checks of the journal.
    patience: seconds from the end of the run; with `by_hand` from the last progress.
    sent: called with the bytes of the journal in each batch.
    """
    directory, alive, limit, ends, failures = shipment.directory, True, math.inf, math.inf, 0
    timeout(TIMEOUTS[0])
    load_library()  # not below the deadline: an import that is interrupted leaves half a module, and every later try fails
    while True:
        if alive and not wait(0.0):
            alive, limit, ends = False, shipment.size, time.monotonic() + patience
        began, offset = time.monotonic(), shipment.state.offset
        try:
            with _deadline(patience + GRACE if by_hand else math.inf), memory_limit(ANSWER):
                busy = shipment.send_batch(limit)
            if not busy and not alive:
                with _deadline(patience + GRACE + shipment.fresh_bytes() / RATE if by_hand else math.inf), memory_limit(ANSWER):
                    shipment.upload()
                    if shipment.size == limit:  # else another attempt has begun
                        shipment.mark_killed(by_hand)
                return SyncResult(True, f"journal fully uploaded to MLflow at {shipment.uri}")
            if not busy:
                shipment.upload(first=True)
            failures = 0
            sent(shipment.state.offset - offset)
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
            rest = f"{limit - shipment.state.offset:,.0f} bytes of the journal are not uploaded"
            return SyncResult(
                False, f"upload to MLflow stopped ({shipment.state.trouble}): {rest}; retry later: trilevel sync {directory}"
            )
        if not busy:
            pause = min(WAIT, max(1.0, 10 * every), 2.0 ** (failures - 1)) if failures else every
            if alive:
                wait(pause)
            else:
                time.sleep(max(0.0, min(pause, 2.0, ends - time.monotonic())))


def follow(directory: Path, parent: int, every: float, linger: float) -> SyncResult:
    """Upload until the process `parent` exits or sends "stop" on standard input, then the rest for at most `linger` seconds."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the training, whose end ends the shipper
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
                message = os.read(0, 100)
                over, listening = b"stop" in message, bool(message)
            elif not listening:
                time.sleep(nap)
            over = over or not (os.getppid() == parent if ours else _lives(parent))
            if time.monotonic() >= until:
                break
        if over:
            signal.alarm(math.ceil(linger) + 30)  # exits even if a library hangs
        return not over

    with _only_shipper(directory, lambda: wait(0.5)) as alone:
        if not alone:
            return SyncResult(False, f"{directory}: another process is uploading this run")
        return _drive(JournalUploader(directory), wait, every, linger, by_hand=False)


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def _only_shipper(directory: Path, wait: Callable[[], bool]) -> Iterator[bool]:
    """Acquire the lock of the run directory, which a lingering predecessor may hold; yields False if `wait` (sleeps) ended first."""
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
