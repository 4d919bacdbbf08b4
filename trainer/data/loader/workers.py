"""Decoding processes: deaf to signals while the rank lives, gone when it ends."""

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
    """A decoding process leaves signals to its rank: schedulers send SIGTERM to all, and the rank still needs its data to stop
    in order. A rank that is gone is noticed by the loader itself."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class Loader(DataLoader[Any]):
    """A DataLoader with deaf workers that doesn't keep an ending process waiting. A DataError of a worker is raised here as it was
    there, without the worker's stack in its text.

    Where something still holds the iterator at the end (an uncaught error's traceback does), multiprocessing would send the
    workers SIGTERM and wait for them for ever.
    """

    def __init__(self, dataset: Dataset[Any], **settings: Any) -> None:
        super().__init__(_ErrorsAsItems(dataset), worker_init_fn=ignore_signals, **settings)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        iterator = super().__iter__()
        for worker in getattr(iterator, "_workers", ()):
            worker.terminate = worker.kill  # what a dropped iterator sends to a busy one: deaf workers don't hear SIGTERM
        _live.add(iterator)
        return _raised(iterator)


class _ErrorsAsItems(Dataset[Any]):
    """A data set whose DataErrors are what it gives."""

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
    """Registered after torch's and multiprocessing's own, so called before them."""
    if _live and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise about what is done here
    for iterator in list(_live):
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()
            worker.join()
