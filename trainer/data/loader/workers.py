"""Worker processes: forked before other threads start, ignoring stop signals, waited for with a limit, killed when the rank ends."""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from torch.utils.data import DataLoader, Dataset

from trainer.data.errors import DataError, WorkerDied
from trainer.storage.process_end import name_of

_live: weakref.WeakSet[Any] = weakref.WeakSet()
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ignore_signals(_worker: int) -> None:
    """Schedulers send SIGTERM to all processes, and the rank still needs data to shut down in order. torch's worker loop detects
    the death of its rank by itself. Until here the signals were blocked: torch's own handler would have ended the worker."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)


class Loader(DataLoader[Any]):
    """A DataLoader whose workers live as long as it, ignore signals and do not block the exit of the rank. A worker's DataError is
    raised here unchanged, without the worker's stack in its text. A sampler is read anew for each iteration.

    timeout: seconds to wait for a batch, then DataError; 0 is without limit. A worker can be stopped, or wait for a dead file system.

    If something still references the iterator at exit (e.g. the traceback of an uncaught error), multiprocessing would send the
    workers SIGTERM, which they ignore, and wait for them for ever.
    """

    def __init__(
        self, dataset: Dataset[Any], workers: int, timeout: float = 0, batch_size: int | None = None, **settings: Any
    ) -> None:
        super().__init__(
            _ErrorsAsItems(dataset),
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            timeout=timeout if workers else 0,
            worker_init_fn=ignore_signals,
            **settings,
        )

    def fork(self) -> None:
        """Start the workers, before anything is read; the sampler must be empty. Call it before a process group exists: CPython before
        3.11.10 can hang in fork() while a C++ thread (gloo's) takes the interpreter's lock (gh-112275)."""
        if self.num_workers:
            self._begin()

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        iterator = self._begin()
        return self._raised(iterator)

    def _begin(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            with self._naming_workers():  # those of an earlier iteration are asked whether they are ready
                iterator = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for worker in getattr(iterator, "_workers", ()):
            worker.terminate = worker.kill  # a dropped iterator terminates busy workers by SIGTERM, which they ignore
        _live.add(iterator)
        _name_dead_workers()
        return iterator

    def _raised(self, iterator: Iterator[Any]) -> Iterator[Any]:
        with self._naming_workers():
            for found in iterator:
                if isinstance(found, DataError):
                    raise found
                yield found

    @contextlib.contextmanager
    def _naming_workers(self) -> Iterator[None]:
        """Turns torch's time-out into a DataError with the state of each worker, and its error for a dead worker into `WorkerDied`."""
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and (text := dead_workers()):
                raise WorkerDied(text) from None
            if "timed out after" not in str(error):  # torch's words, in 2.11 as in 2.15
                raise
            workers = ", ".join(_state(worker.pid) for worker in getattr(self._iterator, "_workers", ()))
            raise DataError(
                f"no batch from the worker processes for {self.timeout:g} s (data.timeout): {workers}; a stopped process, or a file "
                "system that does not answer? --resume continues from the last checkpoint; data.timeout=0 waits without limit"
            ) from None


class _ErrorsAsItems(Dataset[Any]):
    """A data set that returns DataErrors instead of raising them."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, task: Any) -> Any:
        try:
            return self._dataset[task]
        except DataError as error:
            return error


def dead_workers() -> str:
    """Which workers of this process ended in mid-run, how, and what to do; "" for none."""
    there = [worker for iterator in list(_live) for worker in getattr(iterator, "_workers", ())]
    codes = {worker.pid: worker.exitcode for worker in there if worker.exitcode}
    if not codes:
        return ""
    number = next(iter(codes.values()))
    how = f"killed by {name_of(-number)}" if number < 0 else f"ended with exit code {number}"
    remedy = _REMEDIES.get(-number, "a crash of a library, e.g. of an image decoder: data.workers=0 shows its place")
    more = f" and {len(codes) - 1} more" if len(codes) > 1 else ""
    return f"worker process {next(iter(codes))} of the loader{more} {how}: {remedy}. Continue with --resume"


_REMEDIES = {
    signal.SIGKILL: "by the kernel for lack of memory (dmesg)? Lower data.workers or data.window, or give the container more memory",
    signal.SIGBUS: "shared memory is full: enlarge /dev/shm (docker run --shm-size=24g) or lower data.workers",
}


def _name_dead_workers() -> None:
    """torch notices a dead worker by SIGCHLD and raises RuntimeError wherever the main thread is: there raise `WorkerDied` instead."""
    theirs = signal.getsignal(signal.SIGCHLD)
    if not callable(theirs) or isinstance(theirs, _Naming) or threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGCHLD, _Naming(theirs))


class _Naming:
    """A signal handler around torch's."""

    def __init__(self, theirs: Callable[..., Any]) -> None:
        self._theirs = theirs

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self._theirs(number, frame)
        except RuntimeError:
            if text := dead_workers():
                raise WorkerDied(text) from None
            raise


def _state(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return f"process {pid} {psutil.Process(pid).status()}"
    return f"process {pid} gone"


@atexit.register
def _end() -> None:
    """Registered after the handlers of torch and multiprocessing, so called before them."""
    if _live and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for the workers killed here
    for iterator in list(_live):
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()
            worker.join()
