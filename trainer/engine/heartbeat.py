"""Heartbeats of all ranks, and a watch that ends a rank whose collective does not complete, with the names of the late ranks.

Every rank counts the collectives it has entered; a thread writes the count, the place (step, evaluation, checkpoint ...) and its own
count of heartbeats every few seconds into the store in which the ranks met. The store is a TCP server in the agent of the first node
(under plain `srun` in rank 0): it serves all nodes without a shared file system, and its connections are not those of the collectives,
so it answers while these are stuck. Cost: one message of about 100 bytes per rank every 5 s; the others' heartbeats are only read
when the limit is near.

Once this rank has made no progress for the limit: a rank that has entered fewer collectives than another is late, and so is one whose
heartbeats have stopped. While a rank waits for its own loader the limit of `data.timeout` counts instead, and the ranks that wait for
it in a collective name it. Time in which the whole process was stopped does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from trainer.engine.place_clock import DATA, PlaceClock
from trainer.storage.standard_streams import say

LATE = 76  # exit code: a rank did not arrive within engine.timeout
STARTING = 1800.0  # s, at least, until the first step is complete: hashing of shards and compilation take their time
PERIOD = 5.0  # s between two heartbeats
READING = 10.0  # s to wait for the store
REPORTING = 120.0  # s for the report of a late rank, before the process ends
SHOWN = 8  # late ranks that a message names
_ALARM = "trilevel/late"


class Beat(NamedTuple):
    """count: heartbeats so far; entered: collectives; call: the newest one; place: e.g. "step 12"; host: of the rank."""

    count: int
    entered: int
    call: str
    place: str
    host: str


class Heartbeat:
    """The heartbeat of this rank; without `start` only a record of its place. limit: seconds, 0 = none."""

    def __init__(self, rank: int, world: int, limit: float):
        self.rank, self.world, self.limit = rank, world, limit
        self.on_late: Callable[[str], None] = report
        self.clock = PlaceClock()
        self._entered, self._call = 0, ""
        self._alarm = ""  # text of the rank that noticed first
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._stores: list[Any] = []

    def enter(self, call: str) -> None:
        """This rank enters a collective, which all ranks enter in the same order."""
        self._call = call
        self._entered += 1

    def start(self) -> None:
        """Start both threads, for several ranks and a limit above 0. The process group must exist."""
        if self.world == 1 or self.limit == 0:
            return
        store = dist.distributed_c10d._get_default_store()
        self._stores = [
            store.clone(),
            store.clone(),
        ]  # connections of their own: a blocked call of the main thread would hold the lock
        self._period = min(PERIOD, self.limit / 10)
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

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(Exception):  # the store is gone: its process has ended, and with it this run
            while not self._ended.wait(self._period):
                count += 1
                self._write(count)
                if self._stores[0].check([_ALARM]):
                    self._alarm = self._stores[0].get(_ALARM).decode()

    def _write(self, count: int) -> None:
        beat = Beat(count, self._entered, self._call, f"{self.clock.place}, step {self.clock.step}", socket.gethostname())
        self._stores[0].set(f"trilevel/beat/{self.rank}", json.dumps(beat))

    def _watch(self) -> None:
        place, waited, then, before = (-1, "", 0), 0.0, time.monotonic(), None
        while not self._ended.wait(self._period / 2):
            passed, then = time.monotonic() - then, time.monotonic()
            now = self._position()
            if now != place or self.clock.place == DATA:
                place, waited, before = now, 0.0, None
            else:
                waited += min(passed, self._period)  # more has passed where the whole process was stopped
            limit = self.limit if self.clock.stepped else max(self.limit, STARTING)
            if self._alarm:
                return self._end(self._alarm)
            if waited >= limit - 3 * self._period and before is None:
                before = self._read()
            if waited >= limit:
                text = describe(self.rank, self.world, limit, before or {}, self._read())
                if self._position() == place:  # it has not arrived meanwhile
                    return self._end(text)

    def _position(self) -> tuple[int, str, int]:
        return self._entered, self.clock.place, self.clock.step

    def _read(self) -> dict[int, Beat]:
        """The heartbeats of all ranks that have one; {} where the store does not answer."""
        found: dict[int, Beat] = {}

        def read() -> None:
            with contextlib.suppress(Exception):
                keys = [f"trilevel/beat/{rank}" for rank in range(self.world)]
                there = [rank for rank, key in enumerate(keys) if self._stores[1].check([key])]
                values = self._stores[1].multi_get([keys[rank] for rank in there])
                found.update({rank: Beat(*json.loads(value)) for rank, value in zip(there, values, strict=True)})

        _limited(read, READING)
        return dict(found)

    def _end(self, text: str) -> None:
        """Report and exit: the main thread is blocked in a library and can't raise."""
        if self._ended.is_set():
            return
        _limited(lambda: self._stores[1].compare_set(_ALARM, "", text), READING)  # so that all ranks write their stacks
        _limited(lambda: self.on_late(text), REPORTING)
        if not self._ended.is_set():
            os._exit(LATE)


def describe(own: int, world: int, limit: float, before: Mapping[int, Beat], now: Mapping[int, Beat]) -> str:
    """Which ranks are late, where they were last, and what to do. before, now: heartbeats at two times, more than two periods apart."""
    end = (
        f"engine.timeout={limit:g} s have passed. Stacks of all threads: logs/rank-N.txt in the run directory. Continue with --resume; "
        "raise engine.timeout if this is how long it takes"
    )
    if own not in now:
        return f"rank {own} waits for other ranks, and the store of the process group does not answer, so their places are unknown; {end}"
    most = max(beat.entered for beat in now.values())
    silent = {
        rank
        for rank in range(world)
        if rank != own and (rank not in now or now[rank].count == getattr(before.get(rank), "count", -1))
    }
    late = sorted(silent | {rank for rank, beat in now.items() if beat.entered < most})
    waiting = f"rank {own} waits in {now[own].call or 'a collective'} ({now[own].place})"
    if not late:
        hosts = ", ".join(sorted({beat.host for beat in now.values()})[:SHOWN])
        same = f"all {world} ranks are in the same collective, which does not complete: check devices and network of {hosts}"
        return f"{same}; {waiting}; {end}"
    named = [_one(rank, now.get(rank), rank in silent) for rank in late[:SHOWN]]
    more = f" and {len(late) - SHOWN} more" if len(late) > SHOWN else ""
    return f"{'; '.join(named)}{more} did not arrive; {waiting}; {end}"


def _one(rank: int, beat: Beat | None, silent: bool) -> str:
    if beat is None:
        return f"rank {rank} (no heartbeat ever)"
    quiet = "; no heartbeat any more: process stopped, node lost or network cut" if silent else ""
    return f"rank {rank} on {beat.host} (last at {beat.place}{quiet})"


def backstop(limit: float) -> timedelta:
    """The libraries' own limit for a collective, later than that of the watch, which names ranks."""
    return timedelta(seconds=max(STARTING, 2 * limit)) if limit else timedelta(days=30)


def set_limits(limit: timedelta) -> None:
    """Give all process groups this limit: those that DeepSpeed makes have torch's (10 min with NCCL, 30 with gloo)."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name until torch 2.14
    for group in list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else ():
        set_timeout(limit, group)


def report(text: str) -> None:
    """Before a run has a journal and logs: to standard error."""
    say(f"trilevel: {text}", error=True)
    faulthandler.dump_traceback(all_threads=True)


def _limited(call: Callable[[], Any], seconds: float) -> None:
    """Call it, but go on after `seconds`."""

    def suppressed() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=suppressed, daemon=True)
    thread.start()
    thread.join(seconds)
