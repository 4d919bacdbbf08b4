"""`trilevel bench remote`: images per second of our loader from shards behind a network, compared with the same shards as files.

A server on this machine answers every request after a latency, as a web server and (where boto3 is installed) as an S3 server. A
pass is a whole epoch; before it the node's cache is emptied, so every byte comes through it. Passes are interleaved, the first
one warms up, medians are taken. Server and fetching process share the cores with decoding: CPU time per image is shown beside
the rates (the server's not counted: it stands for another machine).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from trainer.bench.input import COLUMNS, measured, ratios
from trainer.bench.input_peers import Peer
from trainer.bench.result import BenchResult
from trainer.config.run_config import Config
from trainer.config.schema import AugmentConfig
from trainer.data.errors import DataError
from trainer.data.loader.build import training_stream
from trainer.data.loader.stream import Stream
from trainer.data.remote.cache import Cache
from trainer.data.shards.index import Index, build_index, open_index
from trainer.storage.source_tree import python_path

LANES = 2
_S3 = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
_DIRECT = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def bench(
    config: Config, *, latency: float = 30.0, workers: int = 2, batch: int = 50, passes: int = 5, limit: int = 4000,
    progress: bool = True,
) -> BenchResult:  # fmt: skip
    """Measure an epoch over the first shards of data.train that hold `limit` images. latency: ms per request. Raises DataError."""
    source = open_index(config.data.train, config.data.labels, verify=None, folder=config.data.index)
    if source.is_remote():
        raise DataError(f"bench remote: data.train={config.data.train} is remote; give local shards")
    did = {
        "local": "local files, in the page cache",
        "http": f"http, {latency:g} ms per request, through an empty cache",
        "s3": f"s3 (boto3), {latency:g} ms per request, through an empty cache",
    }
    with tempfile.TemporaryDirectory(prefix="trilevel-bench-") as scratch, _far(Path(scratch), source, limit, latency) as far:
        streams, peers, count, shards = {}, {}, 0, 0
        for name, pattern in far.patterns.items():
            folder = Path(scratch, "cache", name)
            index = build_index(
                pattern, config.data.labels, folder=f"{scratch}/index", cache=Cache(folder, 1 << 40), progress=False
            )
            streams[name] = training_stream(index, _settings(config, name, pattern, Path(scratch), index, workers, batch), 0, 1)
            peers[name] = Peer(did[name], partial(_epoch, streams[name], iter(range(1 << 30))), partial(_emptied, folder))
            count, shards = len(index), len(index.names)
        rows = measured(peers, passes, "bench remote" if progress else None, far.server)
    order = streams["local"].order(0, None)
    title = (
        f"{count} images in {shards} shards, {config.model.image_size} px, {workers} workers, batch {batch}, {LANES} lanes, windows of "
        f"{streams['local'].layout.window}, {passes} passes of {order.steps} batches"
    )
    notes = ratios(rows, [(name, "local") for name in rows if name != "local"])
    return BenchResult(title, rows, COLUMNS, notes if "s3" in rows else [*notes, "s3: not measured, boto3 is not installed"])


def _epoch(stream: Stream, turns: Iterator[int]) -> int:
    """Images of the next epoch."""
    count = 0
    for batch in stream.epoch(next(turns), None):
        if batch.broken:
            raise DataError(f"bench remote: {batch.broken[0][1]}")
        count += len(batch.labels)
    return count


def _emptied(cache: Path) -> None:
    for shard in Cache(cache, 0).directory.glob("*.tar"):
        shard.unlink()


def _settings(config: Config, name: str, pattern: str, scratch: Path, index: Index, workers: int, batch: int) -> Config:
    """The configuration with crop and flip only, one rank's lanes, and windows of at most a sixteenth of a lane: the first batch
    waits for the shards of the first windows (16 lanes of 4,096 are a twentieth of ImageNet)."""
    folder = None if name == "local" else str(scratch / "cache" / name)
    size = sum(s["bytes"] for s in index.shards)
    data = {
        "train": pattern, "batch": batch, "micro_batch": batch, "workers": workers, "lanes": LANES, "homes": 1, "repeats": 1,
        "window": max(1, min(config.data.window, len(index) // (16 * LANES))), "cache": folder, "cache_size": (size + 1) / 2**30,
    }  # fmt: skip
    return config.changed(augment=AugmentConfig(), data=data, model={"classes": max(2, len(index.classes))})


class Far(NamedTuple):
    """patterns: {row: of its shards}; server: process id."""

    patterns: dict[str, str]
    server: int


@contextmanager
def _far(scratch: Path, source: Index, limit: int, latency: float) -> Iterator[Far]:
    """Serves the first shards of `source` inside the block."""
    folder = scratch / "shards"
    folder.mkdir()
    count = 0
    while count < min(limit, len(source)):
        number = len(list(folder.iterdir()))
        os.symlink(os.path.abspath(source.source(number).url), folder / f"shard-{number:06d}.tar")
        count += int(source.sizes[number])
    names = f"shard-{{000000..{len(list(folder.iterdir())) - 1:06d}}}.tar"
    if os.path.isfile(os.path.join(source.root, "classes.txt")):
        os.symlink(os.path.abspath(os.path.join(source.root, "classes.txt")), folder / "classes.txt")
    command = [sys.executable, "-m", "trainer.bench.latency_server", str(folder), str(latency)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": python_path()}
    )
    before = {name: os.environ.get(name) for name in (*_S3, *_DIRECT, "AWS_ENDPOINT_URL")}
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        found = {"local": f"{folder}/{names}", "http": f"{url}/{names}"}
        os.environ.update(_DIRECT)
        if importlib.util.find_spec("boto3"):
            os.environ.update(_S3 | {"AWS_ENDPOINT_URL": url})  # the fetching process inherits it
            found["s3"] = f"s3://bucket/{names}"
        yield Far(found, process.pid)
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
