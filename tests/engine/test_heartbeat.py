"""Heartbeats over a real TCP store, with ranks in one process: who is named when, and how many requests that takes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from tests.conftest import free_port, wait_for
from trainer.engine import heartbeat as module
from trainer.engine.errors import LATE, RankLate
from trainer.engine.heartbeat import Heartbeat
from trainer.engine.late_ranks import Beat, ended_ranks, own_place
from trainer.engine.place_clock import CHECKPOINT, EVALUATION
from trainer.engine.store import meeting, present

LIMIT = 1.0  # s


class Ranks:
    """Heartbeats of this process; `ended`: (rank, text) of those that would end it."""

    def __init__(self) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
        self.ended: list[tuple[int, str]] = []
        self.all: list[Heartbeat] = []

    def start(
        self, rank: int, world: int = 2, limit: float = LIMIT, start_limit: float = LIMIT, store: Any = None
    ) -> Heartbeat:
        one = Heartbeat(rank, world, limit, start_limit)
        one.on_late = lambda text: self.ended.append((rank, text))
        one.start(store or self.server)
        self.all.append(one)
        return one


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    codes: list[int] = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    found = Ranks()
    yield found
    for one in found.all:
        one.stop()
    assert set(codes) <= {LATE} and bool(codes) == bool(found.ended)


def test_a_rank_that_never_comes_is_named_at_the_limit_of_the_start(ranks: Ranks) -> None:
    """Before the process group exists: torch's own error half an hour later names no rank."""
    ranks.start(0, limit=600).enter("the start of the process group")
    wait_for(lambda: bool(ranks.ended), 20)
    assert ranks.ended[0][1].startswith(
        "rank 1 (no heartbeat ever: not started, still importing, stopped, or its node lost) did not arrive; rank 0 waits in the start "
        "of the process group (start, step 0); engine.start_timeout=1 s have passed"
    )


def test_after_the_first_step_the_other_limit_counts(ranks: Ranks) -> None:
    for rank in (0, 1):
        one = ranks.start(rank, start_limit=600)
        one.enter("all_reduce")
        if rank == 0:
            one.clock.complete_step()
            one.enter("all_gather")
    wait_for(lambda: bool(ranks.ended), 20)
    assert ranks.ended[0][0] == 0 and "engine.timeout=1 s have passed" in ranks.ended[0][1]
    assert "rank 1 on" in ranks.ended[0][1]


def test_a_write_or_an_evaluation_longer_than_the_limit_ends_nothing_until_it_stands_still(ranks: Ranks) -> None:
    """A save of 20 min with engine.timeout=600 used to end every attempt with 76: "rank 0 waits in all_gather (checkpoint, step 12)"."""
    both, written = [ranks.start(rank) for rank in (0, 1)], [0]
    for one in both:
        one.clock.complete_step()
        one.clock.at(EVALUATION, 12)
    end = time.monotonic() + 2.5 * LIMIT
    while time.monotonic() < end:
        for one in both:
            one.enter("all_reduce")
        time.sleep(0.1)
    both[1].enter("broadcast")
    for one in both:
        one.clock.at(CHECKPOINT, 12)
    with both[0].working(lambda: written[0]):
        end = time.monotonic() + 3.5 * LIMIT
        while time.monotonic() < end:
            written[0] += 1
            time.sleep(0.1)
        assert not ranks.ended
        wait_for(lambda: bool(ranks.ended), 20)
    assert "rank 0 on" in ranks.ended[0][1] and "(last at checkpoint, step 12) did not arrive" in ranks.ended[0][1]


class Counting:
    """A store that counts its requests, and fails at the next `failing` ones."""

    def __init__(self, store: Any) -> None:
        self.store, self.requests, self.failing, self.clones = store, Counter[str](), 0, 0

    def clone(self) -> Any:
        self.clones += 1
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.requests[name] += 1
            if self.failing:
                self.failing -= 1
                raise dist.DistNetworkError("Broken pipe")
            return getattr(self.store, name)(*args)

        return call


def test_of_1024_ranks_all_heartbeats_are_read_with_two_requests(ranks: Ranks) -> None:
    """It was one request per rank, so 1,048,576 of them where all ranks looked: more than the store answers within ANSWER s."""
    store, world = Counting(ranks.server), 1024
    one = Heartbeat(0, world, 600, 600)
    one._store, one._stores = store, [store, store]
    missing = {5, 700}
    for rank in set(range(world)) - missing:
        ranks.server.set(f"beat/{rank}", json.dumps(Beat(1, 1, "", "", "a")))
    assert set(one._read()) == set(range(world)) - missing
    assert store.requests["check"] <= 1 + 2 * 2 * 10 and store.requests["multi_get"] == 1
    for rank in missing:
        ranks.server.set(f"beat/{rank}", json.dumps(Beat(1, 1, "", "", "a")))
    store.requests.clear()
    assert len(one._read()) == world
    assert store.requests == {"check": 1, "multi_get": 1}
    store.requests.clear()
    assert present(store, [f"beat/{rank}" for rank in range(world)]) and store.requests == {"check": 1}


def test_a_heartbeat_goes_on_after_an_error_of_the_store(ranks: Ranks) -> None:
    """It used to end at the first one, and the rank was reported as silent."""
    store = Counting(ranks.server)
    one = ranks.start(0, limit=600, start_limit=1e6, store=store)
    one._ended.set()  # with its own period of 5 s the test would take long
    for thread in one._threads:
        thread.join()
    one._ended.clear()
    one._period, store.failing, before = 0.05, 3, store.clones
    one._threads = [module.threading.Thread(target=one._beat, daemon=True)]
    one._threads[0].start()
    wait_for(lambda: json.loads(ranks.server.get("beat/0"))[0] >= 5, 20)
    assert store.failing == 0 and store.clones > before


def test_a_killed_process_is_named_with_its_signal_and_one_that_runs_is_not() -> None:
    mine, host = own_place(), socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        now = {
            rank: Beat(3, 9, "all_reduce", "step, step 4", host, -1, pid, mine[1])
            for rank, pid in enumerate((mine[0], process.pid))
        }
        assert ended_ranks(0, now) == ""
        process.kill()
        wait_for(lambda: bool(ended_ranks(0, now)), 20)
        text = f"rank 1 on {host}: its process {process.pid} was killed by SIGKILL (by the kernel for lack of memory? see dmesg), last"
        assert ended_ranks(0, now).startswith(text)
        process.wait()
        assert f"its process {process.pid} has ended" in ended_ranks(0, now)
        assert ended_ranks(0, {1: now[1]._replace(host="another")}) == "" == ended_ranks(0, {1: now[1]._replace(space=5)})


def test_ranks_whose_heartbeats_stop_are_gone(ranks: Ranks) -> None:
    first, second = ranks.start(0), ranks.start(1)
    assert first.gone() == ""
    second.stop()
    assert first.gone().startswith("rank 1 on ") and "no heartbeat any more" in first.gone()


def test_a_store_that_does_not_answer_names_rank_0_and_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLate, match=rf"127\.0\.0\.1:{port}, .* did not answer within engine\.start_timeout=1 s") as caught:
        meeting(1, 1.0)
    assert caught.value.exit_code == LATE and os.environ["MASTER_PORT"] == port
