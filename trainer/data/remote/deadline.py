"""A total deadline for requests: the request runs in a thread that is abandoned when time is up.

A socket's timeout restarts with every byte, so a server that sends a byte now and then, in headers or body, could block a reader for
ever. The threads are daemons: they end with their connection, at the latest with the process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

from trainer.data.remote.retry import Stalled

_AHEAD = 4  # items produced before they are requested: 1 MiB of a body

T = TypeVar("T")


@contextmanager
def in_thread(work: Callable[[], Generator[T, None, None]]) -> Iterator[Callable[[float | None], T | None]]:
    """`get(seconds)` returns the next item of `work()`, None at its end, and raises what `work` raised. Raises Stalled if the item
    takes longer (None: no limit). Items are never None."""
    made: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()
    space, left = threading.Semaphore(_AHEAD), threading.Event()

    def run() -> None:
        try:
            with closing(work()) as items:
                for item in items:
                    made.put(item)
                    space.acquire()
                    if left.is_set():
                        return
            made.put(None)
        except BaseException as error:
            made.put(error)

    def get(seconds: float | None) -> T | None:
        try:
            item = made.get(timeout=None if seconds is None else max(seconds, 0.0))
        except queue.Empty:
            raise Stalled("no response in time") from None
        space.release()
        if isinstance(item, BaseException):
            raise item
        return item

    threading.Thread(target=run, name="remote shard", daemon=True).start()
    try:
        yield get
    finally:
        left.set()
        space.release()


def in_time(ask: Callable[[], T], seconds: float) -> T:
    """The result of `ask()` (not None). Raises Stalled if it takes longer than `seconds`."""

    def once() -> Generator[T, None, None]:
        yield ask()

    with in_thread(once) as get:
        found = get(seconds)
    assert found is not None
    return found
