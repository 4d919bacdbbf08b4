"""Heartbeats of all ranks, and a watch that ends a rank whose collective does not complete, with the names of the late ranks.

Every rank counts the collectives it has entered; a thread writes the count, the place (start, step, evaluation, checkpoint ...) and its own
count of heartbeats every few seconds into the store in which the ranks meet, see `store`: it serves all nodes without a shared file system,
from before the process group exists, and it answers while collectives are stuck. Cost: one message of about 100 bytes per rank every 5 s;
the others' heartbeats are only read when the limit is near.

Once this rank has made no progress for the limit: a rank that has entered fewer collectives than another is late, and so is one whose
heartbeats have stopped. While a rank waits for its own loader the limit of `data.timeout` counts instead, and the ranks that wait for
it in a collective name it. While a rank works alone, e.g. rank 0 waits for its own write of a checkpoint, the limit counts from its last
progress, on the ranks that wait for it too. Time in which the whole process was stopped does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.engine.errors import LATE
from trainer.engine.late_ranks import NOTHING, Beat, describe, ended_ranks, named_silent, own_place, working
from trainer.engine.place_clock import DATA, PlaceClock
from trainer.engine.store import ANSWER, connection, present
from trainer.storage.exit_code import write_exit_code
from trainer.storage.standard_streams import say

PERIOD = 5.0  # s between two heartbeats
REPORTING = 120.0  # s for the report of a late rank, before the process ends
BACKSTOP = 1800.0  # s, at least: the libraries' own limit, which names no rank
LOOK = 0.05  # s between two looks at the processes of this machine
_ALARM = "late"


class Heartbeat:
    """The heartbeat of this rank; without `start` only a record of its place. limit: seconds; start_limit: the same until the first step is
    complete; 0 = none."""

    def __init__(self, rank: int, world: int, limit: float, start_limit: float = 0.0):
        self.rank, self.world, self.limit, self.start_limit = rank, world, limit, start_limit
        self.on_late: Callable[[str], None] = report
        self.clock = PlaceClock()
        self._entered, self._call = 0, ""
        self._work: Callable[[], int] | None = None
        self._alarm = ""  # text of the rank that noticed first
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._stores: list[Any] = []
        self._there: set[int] = set()  # ranks that have had a heartbeat

    def enter(self, call: str) -> None:
        """This rank enters a collective, which all ranks enter in the same order."""
        self._call = call
        self._entered += 1

    @contextlib.contextmanager
    def working(self, done: Callable[[], int]) -> Iterator[None]:
        """In the block this rank works alone, and the others wait for it; done: a number that rises with its work, e.g. bytes written."""
        self._work = done
        try:
            yield
        finally:
            self._work = None

    @property
    def wanted(self) -> bool:
        """Whether there are other ranks and a limit."""
        return self.world > 1 and bool(self.limit or self.start_limit)

    def start(self, store: Any) -> None:
        """Start both threads, where they are wanted. store: see `store.meeting`; None: there is none."""
        if not self.wanted or store is None:
            return
        self._store = store
        self._stores = [connection(store), connection(store)]
        self._period = min(PERIOD, *(limit / 10 for limit in (self.limit, self.start_limit) if limit))
        self._write(0)
        for run, name in ((self._beat, "heartbeat"), (self._watch, "watch of collectives")):
            self._threads.append(threading.Thread(target=run, name=name, daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End both threads: the run is over, or its failure is being reported."""
        self._ended.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2)  # while the interpreter exits, a thread that comes back from C++ would abort the process

    def gone(self) -> str:
        """The ranks whose process has ended, or whose heartbeats stop within two periods from now; "" for none. Before `stop`: the others
        look at this rank's heartbeats too."""
        if not self._threads or self._ended.is_set():
            return ""
        before, end = self._read(), time.monotonic() + 2.5 * self._period
        while time.monotonic() < end:
            if text := ended_ranks(self.rank, before):
                return text
            time.sleep(LOOK)
        return named_silent(self.rank, self.world, before, self._read())

    def _beat(self) -> None:
        count = failures = 0
        while not self._ended.wait(self._period):
            count += 1
            try:
                self._write(count)
                if self._stores[0].check([_ALARM]):
                    self._alarm = self._stores[0].get(_ALARM).decode()
                failures = 0
            except Exception:  # a connection that was cut; or the store is gone, and with it this run: then less and less often
                failures += 1
                if failures & (failures - 1) == 0:
                    with contextlib.suppress(Exception):
                        self._stores[0] = connection(self._store)

    def _write(self, count: int) -> None:
        work = self._work
        beat = Beat(
            count, self._entered, self._call, f"{self.clock.place}, step {self.clock.step}", socket.gethostname(),
            NOTHING if work is None else work(), *own_place(),
        )  # fmt: skip
        self._stores[0].set(f"beat/{self.rank}", json.dumps(beat))

    def _watch(self) -> None:
        place, waited, then, before, done = None, 0.0, time.monotonic(), None, {}
        turn = (
            self._period * self.rank / self.world
        )  # so that the ranks do not read all at once: the first one alarms the others
        while not self._ended.wait(self._period / 2):
            passed, then = time.monotonic() - then, time.monotonic()
            now = self._position()
            if now != place or self.clock.place == DATA:
                place, waited, before, done = now, -turn, None, {}
            else:
                waited += min(passed, self._period)  # more has passed where the whole process was stopped
            stepped = self.clock.stepped
            limit = (self.limit if stepped else self.start_limit) or math.inf
            if self._alarm:
                return self._end(self._alarm)
            if waited >= limit - 3 * self._period and before is None:
                before = self._read()
            if waited < limit:
                continue
            beats = self._read()
            if (alone := working(beats)) and alone != done:  # a rank works alone and gets on: the limit counts from here
                waited, before, done = 0.0, None, alone
                continue
            key = "engine.timeout" if stepped else "engine.start_timeout"
            text = describe(self.rank, self.world, limit, before or {}, beats, key)
            if self._position() == place:  # it has not arrived meanwhile
                return self._end(text)

    def _position(self) -> tuple[int, str, int, int]:
        work = self._work
        return self._entered, self.clock.place, self.clock.step, NOTHING if work is None else work()

    def _read(self) -> dict[int, Beat]:
        """The heartbeats of all ranks that have one; {} where the store does not answer."""
        found: dict[int, Beat] = {}

        def read() -> None:
            try:
                found.update(self._beats())
            except Exception:
                self._stores[1] = connection(self._store)
                found.update(self._beats())

        _limited(read, ANSWER)
        return dict(found)

    def _beats(self) -> dict[int, Beat]:
        missing = [f"beat/{rank}" for rank in range(self.world) if rank not in self._there]
        self._there.update(int(key.rpartition("/")[2]) for key in present(self._stores[1], missing))
        there = sorted(self._there)
        values = self._stores[1].multi_get([f"beat/{rank}" for rank in there]) if there else []
        return {rank: Beat(*json.loads(value)) for rank, value in zip(there, values, strict=True)}

    def _end(self, text: str) -> None:
        """Report and exit: the main thread is blocked in a library and can't raise."""
        if self._ended.is_set():
            return
        _limited(lambda: self._stores[1].compare_set(_ALARM, "", text), ANSWER)  # so that all ranks write their stacks
        _limited(lambda: self.on_late(text), REPORTING)
        if not self._ended.is_set():
            os._exit(LATE)


def backstop(limit: float, start_limit: float) -> timedelta:
    """The libraries' own limit for a collective, later than that of the watch, which names ranks."""
    return timedelta(seconds=max(BACKSTOP, 2 * limit, 2 * start_limit)) if limit and start_limit else timedelta(days=30)


def set_limits(limit: timedelta) -> None:
    """Give all process groups this limit: those that DeepSpeed makes have torch's (10 min with NCCL, 30 with gloo)."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name until torch 2.14
    for group in list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else ():
        set_timeout(limit, group)


def report(text: str) -> None:
    """Before a run has a journal and logs: to standard error."""
    say(f"trilevel: {text}", error=True)
    faulthandler.dump_traceback(all_threads=True)
    write_exit_code(LATE)


def _limited(call: Callable[[], Any], seconds: float) -> None:
    """Call it, but go on after `seconds`."""

    def suppressed() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=suppressed, daemon=True)
    thread.start()
    thread.join(seconds)
