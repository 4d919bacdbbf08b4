"""Worker processes: they ignore signals, and the rank kills them when it ends."""

from __future__ import annotations

import atexit
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from trainer.data.errors import DataError

_live: weakref.WeakSet[Any] = weakref.WeakSet()


def ignore_signals(_worker: int) -> None:
    """Schedulers send SIGTERM to all processes, and the rank still needs data to shut down in order. torch's worker loop detects
    the death of its rank by itself."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class Loader(DataLoader[Any]):
    """A DataLoader whose workers ignore signals and do not block the exit of the rank. A worker's DataError is raised here unchanged,
    without the worker's stack in its text.

    If something still references the iterator at exit (e.g. the traceback of an uncaught error), multiprocessing would send the
    workers SIGTERM, which they ignore, and wait for them for ever.
    """

    def __init__(self, dataset: Dataset[Any], **settings: Any) -> None:
        super().__init__(_ErrorsAsItems(dataset), worker_init_fn=ignore_signals, **settings)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        iterator = super().__iter__()
        for worker in getattr(iterator, "_workers", ()):
            worker.terminate = worker.kill  # a dropped iterator terminates busy workers by SIGTERM, which they ignore
        _live.add(iterator)
        return _raised(iterator)


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


def _raised(iterator: Iterator[Any]) -> Iterator[Any]:
    for found in iterator:
        if isinstance(found, DataError):
            raise found
        yield found


@atexit.register
def _end() -> None:
    """Registered after the handlers of torch and multiprocessing, so called before them."""
    if _live and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for the workers killed here
    for iterator in list(_live):
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()
            worker.join()
