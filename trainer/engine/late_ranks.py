"""Heartbeats of all ranks -> which ranks are late, where they were last, and what to do, as text."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import NamedTuple

from trainer.storage.process_end import how_ended, process_space

SHOWN = 8  # late ranks that a message names
NOTHING = -1


class Beat(NamedTuple):
    """count: heartbeats so far; entered: collectives; call: the newest one; place: e.g. "step 12"; host: of the rank; work: see
    `Heartbeat.working`; process, space: its process id and the container that this counts in."""

    count: int
    entered: int
    call: str
    place: str
    host: str
    work: int = NOTHING
    process: int = 0
    space: int = 0


def own_place() -> tuple[int, int]:
    """`process` and `space` of this process."""
    return os.getpid(), process_space()


def working(now: Mapping[int, Beat]) -> dict[int, int]:
    """{rank: its work} of the ranks that others wait for while they work alone."""
    most = max((beat.entered for beat in now.values()), default=0)
    return {rank: beat.work for rank, beat in now.items() if beat.work != NOTHING and beat.entered < most}


def describe(
    own: int, world: int, limit: float, before: Mapping[int, Beat], now: Mapping[int, Beat], key: str = "engine.timeout"
) -> str:
    """Which ranks are late, where they were last, and what to do. before, now: heartbeats at two times, more than two periods apart; key:
    of the limit."""
    end = (
        f"{key}={limit:g} s have passed. Stacks of all threads: logs/rank-N.txt in the run directory. Continue with --resume; "
        f"raise {key} if this is how long it takes"
    )
    if own not in now:
        return f"rank {own} waits for other ranks, and the store of the process group does not answer, so their places are unknown; {end}"
    most = max(beat.entered for beat in now.values())
    silent = silent_ranks(own, world, before, now)
    late = sorted(silent | {rank for rank, beat in now.items() if beat.entered < most})
    waiting = f"rank {own} waits in {now[own].call or 'a collective'} ({now[own].place})"
    if not late:
        hosts = ", ".join(sorted({beat.host for beat in now.values()})[:SHOWN])
        same = f"all {world} ranks are in the same collective, which does not complete: check devices and network of {hosts}"
        return f"{same}; {waiting}; {end}"
    waiting = f"rank {own} itself made no progress" if own in late else waiting
    return f"{_named(late, silent, now)} did not arrive; {waiting}; {end}"


def silent_ranks(own: int, world: int, before: Mapping[int, Beat], now: Mapping[int, Beat]) -> set[int]:
    """The ranks without a heartbeat, or without a new one."""
    return {
        rank
        for rank in range(world)
        if rank != own and (rank not in now or now[rank].count == getattr(before.get(rank), "count", -1))
    }


def ended_ranks(own: int, now: Mapping[int, Beat], ended: Callable[[int], str] = how_ended) -> str:
    """The ranks of this machine whose process has ended, and how; "" for none."""
    host, (_, space) = socket.gethostname(), own_place()
    found = []
    for rank, beat in sorted(now.items()):
        if rank != own and (beat.host, beat.space) == (host, space) and beat.process and (how := ended(beat.process)):
            memory = " (by the kernel for lack of memory? see dmesg)" if how.endswith("SIGKILL") else ""
            found.append(f"rank {rank} on {beat.host}: its process {beat.process} {how}{memory}, last at {beat.place}")
    return _shortened(found)


def named_silent(own: int, world: int, before: Mapping[int, Beat], now: Mapping[int, Beat]) -> str:
    """The ranks whose heartbeats have stopped; "" for none, and where the store does not answer."""
    silent = silent_ranks(own, world, before, now) if own in now else set()
    return _named(sorted(silent), silent, now)


def _named(late: list[int], silent: set[int], now: Mapping[int, Beat]) -> str:
    return _shortened([_one(rank, now.get(rank), rank in silent) for rank in late])


def _shortened(named: list[str]) -> str:
    return "; ".join(named[:SHOWN]) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")


def _one(rank: int, beat: Beat | None, silent: bool) -> str:
    if beat is None:
        return f"rank {rank} (no heartbeat ever: not started, still importing, stopped, or its node lost)"
    quiet = "; no heartbeat any more: process stopped, node lost or network cut" if silent else ""
    return f"rank {rank} on {beat.host} (last at {beat.place}{quiet})"
