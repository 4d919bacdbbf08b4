"""The store in which the ranks meet: torch's TCP server at MASTER_ADDR:MASTER_PORT, reached before the process group exists.

The agent of the first node serves it (under plain `srun` rank 0 itself). The connection here is not that of the process group, so
heartbeats are written and read while that is being made, and while its collectives are stuck.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.engine.errors import RankLate

ANSWER = 10.0  # s to wait for an answer of the store
CONNECTING = 30.0  # s for a further connection; torch tries twice. On a busy machine .8 s ended healthy starts
_engines = itertools.count()  # of this process; all ranks make theirs in the same order


def meeting(rank: int, limit: float) -> Any:
    """A connection to the store for keys of this attempt alone; None where the environment names no address. limit: seconds to wait for the
    server, 0 = none. Raises RankLate where it does not answer."""
    number = next(_engines)
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    serves = (
        rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    )  # as torch decides; torch then uses this server too
    wait = timedelta(seconds=limit / 2) if limit else timedelta(days=30)  # torch tries twice
    try:
        store = dist.TCPStore(host, int(port), None, serves, wait, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        if serves:
            return None  # e.g. the port is in use: torch raises that itself where it needs the store
        raise RankLate(
            f"rank {rank}: the store of the process group at MASTER_ADDR:MASTER_PORT={host}:{port}, which rank 0 or the launcher of the "
            f"first node opens, did not answer within engine.start_timeout={limit:g} s: rank 0 stopped or still starting, its node lost, "
            "or the port closed by a firewall. Continue with --resume; raise engine.start_timeout if this is how long the start takes"
        ) from error
    store.set_timeout(timedelta(seconds=CONNECTING))
    return dist.PrefixStore(f"trilevel/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{number}", store)


def connection(store: Any) -> Any:
    """One more connection to the store: each thread has its own, because a call that waits holds the connection's lock."""
    found = store.clone()
    found.set_timeout(timedelta(seconds=ANSWER))
    return found


def present(store: Any, keys: Sequence[str]) -> list[str]:
    """Those of the keys that the store has. One request if all are there; else by halves, so that m missing ones of n cost about
    2 m log2(n / m) requests: one request per key and rank, 1,024 x 1,024 of them, would take the server's one thread minutes."""
    if not keys:
        return []
    if store.check(list(keys)):
        return list(keys)
    half = len(keys) // 2
    return present(store, keys[:half]) + present(store, keys[half:]) if half else []
