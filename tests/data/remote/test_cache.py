"""The cache on the node: bounded, shared, whole whatever is killed, filled ahead of use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import environment, wait_for
from tests.support.http_server import Web, serving
from tests.support.images import config, write_shards
from trainer.data.errors import DataError
from trainer.data.loader.build import training_stream
from trainer.data.loader.prefetch import Prefetcher, refuse_small_cache, rows_of_node, upcoming
from trainer.data.order import EpochOrder, Layout
from trainer.data.remote import cache_folder
from trainer.data.remote.cache import Cache
from trainer.data.remote.cache_check import CacheCheck
from trainer.data.remote.client import RemoteStat
from trainer.data.shards.index import Index, build_index
from trainer.data.shards.reader import Reader

SIZES = [4] * 8
FETCH = """
import sys
from pathlib import Path
from trainer.data.remote.cache import Cache, Source
from trainer.data.remote.cache_check import CacheCheck
cache = Cache(Path(sys.argv[1]), int(sys.argv[2]))
for source in sys.argv[3:]:
    url, size, whole = source.split("|")
    cache.fetch(Source(url, int(size), whole))
"""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    write_shards(tmp_path / "www", SIZES)
    with serving(tmp_path / "www") as server:
        yield server


@pytest.fixture
def index(web: Web, tmp_path: Path) -> Index:
    pattern = f"{web.url}/train-{{0000..0007}}.tar"
    index = build_index(pattern, progress=False, folder=str(tmp_path), cache=Cache(tmp_path / "indexing", 1 << 30))
    web.gets.clear()
    web.most = 0  # indexing reads as many shards at a time as there are cores
    return index


def total(cache: Cache) -> int:
    return sum(p.stat().st_size for p in cache.directory.iterdir() if p.suffix in (".tar", ".part"))


def fetching(cache: Cache, index: Index, shards: list[int]) -> subprocess.Popen[bytes]:
    """A process of its own that fetches these shards."""
    sources = ["|".join(map(str, index.source(s))) for s in shards]
    return subprocess.Popen([sys.executable, "-c", FETCH, str(cache.folder), str(cache.size), *sources], env=environment())


def test_two_processes_fetch_a_shard_once(web: Web, index: Index, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30)
    web.latency = 0.1
    processes = [fetching(cache, index, list(range(8))) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda s: cache.fetch(index.source(s)), [*range(8), *range(8)]))
    assert [p.wait() for p in processes] == [0, 0]
    assert web.gets == dict.fromkeys(index.names, 1)
    assert not list(cache.folder.rglob("*.part"))


def test_many_threads_make_a_new_folder_at_once(tmp_path: Path) -> None:
    for turn in range(40):
        start = threading.Barrier(8)

        def prepare(folder: Path, start: threading.Barrier = start) -> Path:
            start.wait(60)
            return cache_folder.prepare(folder)

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(prepare, [tmp_path / str(turn)] * 8))) == 1


def test_a_killed_fetch_leaves_nothing_broken(web: Web, index: Index, tmp_path: Path) -> None:
    length = index.shards[0]["bytes"]
    cache = Cache(tmp_path / "cache", 2 * length)
    web.faults = {index.names[0]: ["trickle"], index.names[1]: ["trickle"]}
    killed = [fetching(cache, index, [shard]) for shard in (0, 1)]
    wait_for(lambda: web.gets[index.names[0]] and web.gets[index.names[1]])
    assert total(cache) == 2 * length, "space is reserved before the bytes arrive"
    for process in killed:
        process.kill()
        process.wait()
    assert len(list(cache.folder.rglob("*.part"))) == 2 and not list(cache.folder.rglob("*.tar"))
    cache.fetch(index.source(0))  # its own left-over is fetched again, the other's is deleted
    cache.fetch(index.source(2))
    assert len(list(cache.folder.rglob("*.tar"))) == 2 and not list(cache.folder.rglob("*.part"))
    assert not any(isinstance(d, DataError) for d in Reader(index, cache).read(np.arange(32)))


def test_the_longest_unused_go_and_open_ones_stay_readable(web: Web, index: Index, tmp_path: Path) -> None:
    length = max(s["bytes"] for s in index.shards)
    cache = Cache(tmp_path / "cache", 3 * length)
    for shard in (0, 1, 2):
        cache.fetch(index.source(shard))
        time.sleep(0.01)
    assert cache.holds(index.source(0))
    file = cache.open(index.source(1))
    time.sleep(0.01)
    assert cache.holds(index.source(0)) and cache.holds(index.source(2))
    cache.fetch(index.source(3))
    assert [cache.holds(index.source(s)) for s in range(4)] == [True, False, True, True]
    with os.fdopen(file, "rb") as opened:
        assert len(opened.read()) == index.shards[1]["bytes"]
    damaged = next(cache.folder.rglob(f"{index.source(0).whole}.tar"))
    damaged.write_bytes(b"")
    os.close(cache.open(index.source(0)))
    assert damaged.stat().st_size == index.shards[0]["bytes"], "fetched again"


def test_a_full_cache_waits_and_never_holds_more(web: Web, index: Index, tmp_path: Path) -> None:
    length = max(s["bytes"] for s in index.shards)
    cache = Cache(tmp_path / "cache", 2 * length)
    web.latency = 0.03
    most = 0
    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(cache.fetch, index.source(s)) for s in range(8)]
        while not all(d.done() for d in done):
            if cache.directory.is_dir():
                with cache_folder.locked(cache.directory):  # else a file is summed, deleted, and its successor summed too
                    most = max(most, total(cache))
        for d in done:
            d.result()
    assert 0 < most <= cache.size and web.most <= 2
    with pytest.raises(DataError, match=r"has \d+ bytes, more than data.cache_size .1000 bytes."):
        Cache(tmp_path / "small", 1000).fetch(index.source(0))


def test_two_shards_of_unknown_size_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.remote.cache._STEP", 1000)
    (tmp_path / "x").write_bytes(bytes(8000))
    cache = Cache(tmp_path / "cache", 9000)
    half = threading.Barrier(2)

    def slowly(url: str, _size: int | None) -> Iterator[bytes]:
        yield bytes(4000)
        half.wait(60)
        yield bytes(4000)

    monkeypatch.setattr("trainer.data.remote.cache.stream", slowly)
    monkeypatch.setattr("trainer.data.remote.cache.stat", lambda _: RemoteStat(None, ""))

    def take(url: str) -> int:
        with cache.import_shard(url) as (path, _):
            return path.stat().st_size

    with ThreadPoolExecutor(2) as pool:
        assert [done.result(60) for done in [pool.submit(take, f"pipe:cat {n}") for n in range(2)]] == [8000, 8000]


def test_a_shard_gets_its_name_when_its_bytes_are_on_the_disk_and_no_count_runs(
    web: Web, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the node after the rename must not leave a name with other bytes; a count at that moment must not miss a file."""
    calls: list[str] = []
    fsync, rename, locked = os.fsync, Path.rename, cache_folder.locked

    @contextmanager
    def watched(own: Path) -> Iterator[None]:
        with locked(own):
            calls.append("lock")
            yield
            calls.append("unlock")

    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda self, to: calls.append("rename") or rename(self, to))
    monkeypatch.setattr(cache_folder, "locked", watched)
    cache = Cache(tmp_path / "cache", 1 << 30)
    cache.fetch(index.source(0))
    assert cache.holds(index.source(0))
    assert calls[-4:] == ["fsync", "lock", "rename", "unlock"], calls
    calls.clear()
    with cache.import_shard(f"{web.url}/{index.names[1]}") as (part, _):
        assert calls[-1] == "fsync" and part.stat().st_size == index.shards[1]["bytes"]
    assert calls[-4:] == ["fsync", "lock", "rename", "unlock"], calls


def test_at_the_end_of_an_epoch_the_next_ones_shards_are_fetched(
    web: Web, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(Prefetcher, "request", lambda self, shards: asked.append(list(shards)))
    settings = config("x", data={"cache": str(tmp_path / "cache"), "cache_size": 0.1, "workers": 0, "batch": 4, "window": 4})
    stream = training_stream(index, settings, 0, 1)
    for epoch in range(3):
        asked.clear()
        list(stream.epoch(epoch, None))
        following = list(upcoming(stream.order(epoch + 1, None), 0, stream.bounds))
        assert asked[-1][-len(following) :] == following, epoch
        assert following != list(upcoming(stream.order(epoch, None), 0, stream.bounds)), "epochs begin with other shards"


def test_the_order_names_the_shards_that_come_next() -> None:
    """What is read in a window is exactly what was predicted, on every rank, with dropping and repeats."""
    rng = np.random.default_rng(0)
    for repeats, share in ((1, 1.0), (1, 0.5), (3, 0.7)):
        sizes = rng.integers(1, 40, 60)
        layout = Layout(sizes, 3, 24, 4, 32, homes=2, repeats=repeats)
        keep = np.packbits(rng.random(sizes.sum()) < share, bitorder="little")
        order = EpochOrder(layout, 2, keep)
        for rows in ((0, 24), (0, 6), (6, 24)):
            lanes = order.lanes_of(*rows)
            read = [np.searchsorted(layout.first, order.rows(s, *rows).ids, side="right") - 1 for s in range(order.steps)]
            for step in range(order.steps):
                windows = {int(w) + turn for w in order.window_at(step) for turn in (0, 1)}
                message = np.concatenate([order.shards_of(int(lane), w) for lane in lanes for w in windows])
                assert set(read[step]) <= set(message.tolist())
            assert set(np.concatenate(read).tolist()) <= set(upcoming(order, 0, rows))
            assert set(read[-1].tolist()) <= set(upcoming(order, order.steps - 1, rows))


def test_shards_are_there_before_they_are_read(web: Web, index: Index, tmp_path: Path) -> None:
    """With the server gone after the start the epoch is read whole: everything had been fetched ahead."""
    settings = config("x", data={"cache": str(tmp_path / "cache"), "cache_size": 0.1, "workers": 0, "batch": 4, "window": 4})
    stream = training_stream(index, settings, 0, 1)
    batches = stream.epoch(0, None)
    first = next(batches)
    cache = Cache(tmp_path / "cache", 1 << 30, CacheCheck(0.0))
    wait_for(lambda: all(cache.holds(index.source(s)) for s in range(8)), 30)
    assert web.gets == dict.fromkeys(index.names, 1)
    web.faults = {name: [404] * 9 for name in index.names}
    assert not any(b.broken for b in [first, *batches])
    process = stream._ahead._process  # pyright: ignore[reportOptionalMemberAccess]
    assert process is not None
    process.kill()  # the stream continues without it, and starts another
    process.wait()
    assert not any(b.broken for b in stream.epoch(1, None))


def test_no_more_is_fetched_ahead_than_fits(web: Web, index: Index, tmp_path: Path) -> None:
    length = max(s["bytes"] for s in index.shards)
    cache = Cache(tmp_path / "cache", 6 * length)
    ahead = Prefetcher(index, cache, 0.5)
    ahead.request([5, 5, 4, 3, 2, 1, 0])
    wait_for(lambda: len(list(cache.folder.rglob("*.tar"))) == 3, 30)
    ahead.request([5, 4, 0])
    wait_for(lambda: cache.holds(index.source(0)), 30)
    assert [web.gets[name] for name in index.names] == [1, 0, 0, 1, 1, 1, 0, 0]
    process = ahead._process
    del ahead
    assert process is not None and process.poll() is not None, "the fetcher ends with the object that uses it"


def test_too_small_a_cache_is_refused_with_the_number(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length = sum(s["bytes"] for s in index.shards) / 8
    layout = Layout(index.sizes, 0, 12, 4, 4)
    refuse_small_cache(index, layout, Cache(tmp_path, int(4.1 * length)), (0, 6), 1.0)  # 2 of 4 lanes x 2 shards
    with pytest.raises(DataError, match=r"2 lanes of this node's ranks x 2 shards of a window are 4 shards"):
        refuse_small_cache(index, layout, Cache(tmp_path, int(3.9 * length)), (0, 6), 1.0)
    with pytest.raises(DataError, match=r"2 lanes .* x 3 shards"):
        refuse_small_cache(index, layout, Cache(tmp_path, int(4.1 * length)), (0, 6), 0.5)
    refuse_small_cache(index, Layout(index.sizes, 0, 12, 4, 1000), Cache(tmp_path, int(8.1 * length)), (0, 12), 1.0)
    with pytest.raises(DataError, match=r"4 lanes .* x 8 shards of a window are 8 shards"):  # no more than the data set has
        refuse_small_cache(index, Layout(index.sizes, 0, 12, 4, 1000), Cache(tmp_path, int(7.9 * length)), (0, 12), 1.0)
    small = {"cache": str(tmp_path / "cache"), "cache_size": 2 * length / 2**30}
    with pytest.raises(DataError, match=r"data.cache_size=.*raise data.cache_size, or lower data.lanes"):
        training_stream(index, config("x", data=small), 0, 1)
    with pytest.raises(DataError, match=r"cache_size=1e\+06 \(GiB\): only .* GiB are free"):
        training_stream(index, config("x", data={"cache": str(tmp_path / "cache"), "cache_size": 1e6}), 0, 1)
    assert rows_of_node(12, 3, 1) == ((4, 8), 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert rows_of_node(12, 3, 1) == ((0, 8), 2)
