"""`python -m trainer.data.remote.fetch_process FOLDER SIZE SINCE`: prefetches shards into a cache, in its own process.

SINCE: start of the run in seconds since 1970; shards that were cached before are hashed first.
Every line of standard input is a JSON list of [url, bytes, hash], soonest needed first, and replaces the previous list. The process
ends at a line `end` or at the end of standard input, so at the latest with the rank that started it. A shard that it cannot fetch is
fetched again by the reader, which reports the error.
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
from trainer.data.remote.cache_check import CacheCheck

_THREADS = 4  # shards fetched at once


class FetchQueue:
    """Shards still to be fetched, soonest needed first; replaced as a whole."""

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
        except (DataError, OSError) as error:  # keep the thread alive: nothing restarts it
            print(f"prefetch failed: {error}", file=sys.stderr, flush=True)
        finally:
            queue.done(source)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the rank shuts down in order and needs data until then
    cache = Cache(Path(sys.argv[1]), int(sys.argv[2]), CacheCheck(float(sys.argv[3])))
    plan = FetchQueue()
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
