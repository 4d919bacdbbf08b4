"""The kinds of faults that are injected at random moments: where the job runs, what is done to it, what undoes it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

import psutil

from tests.faults.live_job import LIMIT, Job, lives
from tests.faults.places import Place, between_hosts, local, over_http, own_disk, run, with_clock
from tests.support.memory_cgroup import memory_cgroup

SHORT = (1.0, 5.0)  # s that a fault lasts which heals
LONG = (LIMIT + 5.0, LIMIT + 15.0)  # longer than engine.timeout


class Kind(NamedTuple):
    """inject: returns whether there was something to hit; heal: undoes it after a while (None: nothing to undo); lasts: bounds of that
    while in s; ends: all ranks of the attempt end, so that the next step is one of a new attempt; by_hand: the launcher may end too,
    and the same command is typed again, after the healing."""

    inject: Callable[[Job, random.Random], bool]
    heal: Callable[[Job], None] | None = None
    lasts: tuple[float, float] = SHORT
    ends: bool = True
    by_hand: bool = False
    place: Place = local


def _signalled(which: str, number: signal.Signals, **more: Any) -> Kind:
    return Kind(lambda job, chosen: job.send(which, number, chosen), **more)


def _launcher(number: signal.Signals) -> Kind:
    def inject(job: Job, chosen: random.Random) -> bool:
        job.process.send_signal(number)
        return True

    return Kind(inject, by_hand=True)


def _kill_all(job: Job, chosen: random.Random) -> bool:
    """As a node that loses its power, its disk intact: launcher, agent, ranks and workers at once."""
    for one in [psutil.Process(job.process.pid), *job.below(job.process)]:
        with contextlib.suppress(psutil.Error):
            one.kill()
    return True


def _continue(job: Job) -> None:
    for one in job.find("rank 1"):
        one.send_signal(signal.SIGCONT)


def _slow(job: Job, chosen: random.Random) -> bool:
    """Rank 1 has a tenth of its time, in turns of a tenth of a second, until `heal`."""
    found = job.find("rank 1")

    def turns(rank: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            while job.at == "slow" and lives(rank):
                rank.suspend()
                time.sleep(0.09)
                rank.resume()
                time.sleep(0.01)

    job.at = "slow"
    for rank in found:
        threading.Thread(target=turns, args=(rank,), daemon=True).start()
    return bool(found)


def _fast(job: Job) -> None:
    job.at = None
    time.sleep(0.2)  # the turn in progress
    _continue(job)


def _out_of_memory(job: Job, chosen: random.Random) -> bool:
    """The kernel kills rank 1: it may take no more memory than it has."""
    for rank in job.find("rank 1"):
        with memory_cgroup() as cgroup:
            cgroup.squeeze(rank.pid, lambda rank=rank: lives(rank), 60)
            return bool(cgroup.kills())
    return False


def _kill_and_damage(job: Job, chosen: random.Random) -> bool:
    """A rank is killed, and one bit of the newest checkpoint turned over: the next attempt has to take the checkpoint before."""
    there = (job.run / "checkpoints").glob
    if len(list(there("step-????????"))) < 2 or not job.send("rank 1", signal.SIGKILL, chosen):
        return False
    time.sleep(0.5)  # a write of rank 0 that is in progress, and the deletion of old checkpoints after it
    file = chosen.choice(sorted(path for path in max(there("step-????????")).iterdir() if path.stat().st_size))
    content = bytearray(file.read_bytes())
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    file.write_bytes(content)
    return True


def _fill(job: Job, chosen: random.Random) -> bool:
    """The file system of `runs` has no byte left."""
    for piece in (bytes(1 << 20), b"\0"):
        with (job.folder / "runs" / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(piece)
    return True


def _read_only(job: Job, chosen: random.Random) -> bool:
    job.at.fail()
    return True


def _repaired(job: Job) -> None:
    """Once nothing has files open there: what has ended by then is not for this fault to end."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(subprocess.CalledProcessError):
            return job.at.repair()
        time.sleep(0.5)
    raise AssertionError("the ranks keep files of a read-only file system open for 120 s")


def _frozen(job: Job, chosen: random.Random) -> bool:
    job.at.freeze()
    return True


def _renamed(job: Job, chosen: random.Random) -> bool:
    job.run.rename(job.run.with_name("elsewhere"))
    return True


def _renamed_back(job: Job) -> None:
    """Also where a new attempt has begun a run of the same name meanwhile: that one leaves."""
    for one in job.ranks().values():
        with contextlib.suppress(psutil.Error):
            one.wait(120)
    os.rename(job.run.with_name("elsewhere"), job.run)


def _unanswered(job: Job, chosen: random.Random) -> bool:
    """The store answers every request with 503, ends the connection, or is silent for a second first."""
    how = chosen.choice(("503", "cut", "silent"))

    def hook(handler: BaseHTTPRequestHandler) -> bool:
        if how == "silent":
            time.sleep(1)
        if how == "cut":
            handler.close_connection = True
            handler.connection.close()
        else:
            handler.send_error(503)
        return True

    job.at.hook = hook
    return True


def _answered(job: Job) -> None:
    job.at.hook = lambda _: False


def _cable(state: str) -> Callable[[Job], None]:
    return lambda job: run("ip", "-n", job.at.login, "link", "set", "port1", state)


def _cut(job: Job, chosen: random.Random) -> bool:
    _cable("down")(job)
    return True


def _late(job: Job, chosen: random.Random) -> bool:
    job.at.touch()
    return True


KINDS = {
    "rank 0 killed": _signalled("rank 0", signal.SIGKILL),
    "rank 1 killed": _signalled("rank 1", signal.SIGKILL),
    "loader worker killed": _signalled("worker", signal.SIGKILL),
    "rank 1 stopped": _signalled("rank 1", signal.SIGSTOP),
    "loader worker stopped": _signalled("worker", signal.SIGSTOP),
    "launcher killed": _launcher(signal.SIGKILL),
    "SIGTERM to the launcher": _launcher(signal.SIGTERM),
    "rank 1 killed, newest checkpoint damaged": Kind(_kill_and_damage),
    "disk full for a while": Kind(
        _fill, heal=lambda job: (job.folder / "runs" / "filler").unlink(), ends=False, place=own_disk
    ),
    "all processes killed at once": Kind(_kill_all, by_hand=True),
    "rank 1 stopped for a while": _signalled("rank 1", signal.SIGSTOP, heal=_continue, ends=False),
    "rank 1 slow for a while": Kind(_slow, heal=_fast, ends=False),
    "rank 1 killed by the kernel for lack of memory": Kind(_out_of_memory),
    "file system read-only, then repaired": Kind(_read_only, heal=_repaired, by_hand=True, place=own_disk),
    "writes to the disk wait for a while": Kind(_frozen, heal=lambda job: job.at.thaw(), ends=False, place=own_disk),
    "run directory renamed, then named back": Kind(_renamed, heal=_renamed_back, by_hand=True),
    "store fails for a while": Kind(_unanswered, heal=_answered, ends=False, place=over_http),
    "network cut that heals": Kind(_cut, heal=_cable("up"), ends=False, place=between_hosts),
    "network cut beyond engine.timeout": Kind(_cut, heal=_cable("up"), lasts=LONG, by_hand=True, place=between_hosts),
    "wall clock set back, then on": Kind(_late, heal=lambda job: job.at.unlink(), ends=False, place=with_clock),
}
