"""Decoding processes: deaf to signals while the rank lives, gone when it ends, and their batches in memory that both see."""

from __future__ import annotations

import atexit
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

_live: weakref.WeakSet[Any] = weakref.WeakSet()


def deaf(_worker: int) -> None:
    """A decoding process leaves signals to its rank: schedulers send SIGTERM to all, and the rank still needs its data to stop
    in order. A rank that is gone is noticed by the loader itself."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class Loader(DataLoader[Any]):
    """A DataLoader with deaf workers that doesn't keep an ending process waiting.

    Where something still holds the iterator at the end (an uncaught error's traceback does), multiprocessing would send the
    workers SIGTERM and wait for them for ever.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, worker_init_fn=deaf, **settings)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        iterator = super().__iter__()
        _live.add(iterator)
        return iterator


@atexit.register
def _end() -> None:
    """Registered after torch's and multiprocessing's own, so called before them."""
    if _live and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise about what is done here
    for iterator in list(_live):
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()
            worker.join()


def room(slots: int, size: int) -> Tensor:
    """(slots, 3, S, S) uint8, not yet filled. Channels last in memory, as decoders and the resize write; in a worker, in the shared
    memory through which the batch goes to the rank: filling it elsewhere and copying took a tenth of the work of an image."""
    shape = (slots, size, size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    storage: Any = torch.UntypedStorage._new_shared(slots * size * size * 3)  # what torch's own collate takes
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape, (size * size * 3, size * 3, 3, 1)).permute(0, 3, 1, 2)
