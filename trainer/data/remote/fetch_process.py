"""`python -m trainer.data.remote.fetch_process FOLDER SIZE`: fetches shards into a cache ahead of their use, in a process of its own.

Every line of standard input is a JSON list of [url, bytes, hash], soonest needed first, and takes the place of the one before.
It ends at a line `end` and with its standard input, so with the rank that started it. What it can't fetch it leaves to the
reader, who says why.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from trainer.data.errors import DataError
from trainer.data.remote.cache import Cache, Source

_THREADS = 4  # shards fetched at once


class FetchQueue:
    """What is still to be fetched, soonest first; replaced as a whole."""

    def __init__(self) -> None:
        self._wanted: list[Source] = []
        self._fetching: set[str] = set()
        self._changed = threading.Condition()

    def replace(self, wanted: list[Source]) -> None:
        with self._changed:
            self._wanted = wanted
            self._changed.notify_all()

    def next(self) -> Source:
        with self._changed:
            while True:
                while self._wanted:
                    source = self._wanted.pop(0)
                    if source.whole not in self._fetching:
                        self._fetching.add(source.whole)
                        return source
                self._changed.wait()

    def done(self, source: Source) -> None:
        with self._changed:
            self._fetching.discard(source.whole)


def _work(cache: Cache, queue: FetchQueue) -> None:
    while True:
        source = queue.next()
        try:
            cache.fetch(source)
        except (DataError, OSError) as error:  # a thread that ended would fetch nothing more
            print(f"not fetched ahead: {error}", file=sys.stderr, flush=True)
        finally:
            queue.done(source)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the rank stops in order and needs its data until then
    cache, plan = Cache(Path(sys.argv[1]), int(sys.argv[2])), FetchQueue()
    for _ in range(_THREADS):
        threading.Thread(target=_work, args=(cache, plan), daemon=True).start()
    for line in sys.stdin:
        if line == "end\n":
            break
        wanted = [Source(*entry) for entry in json.loads(line)]
        plan.replace([source for source in wanted if not cache.holds(source)])
    os._exit(0)


if __name__ == "__main__":
    main()
