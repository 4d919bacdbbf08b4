"""`trilevel bench remote`: images per second of our stream from shards behind a network, against the same shards as files.

A server on this machine answers every request after a latency, as a web server and (where boto3 is installed) as an S3 server. A
pass is a whole epoch; before it the node's cache is emptied, so every byte comes through it. Passes are interleaved, the first
one warms up, medians are taken. Server and fetching process share the cores with decoding: CPU time per image is shown beside
the rates (the server's not counted: it stands for another machine).
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from trainer.config.run_config import Config
from trainer.config.schema import Augment
from trainer.data.errors import DataError
from trainer.data.loader.stream import Stream
from trainer.data.progress import bar
from trainer.data.remote.cache import Cache
from trainer.data.shards.index import Index, build_index, open_index
from trainer.storage.source_tree import python_path

TARGET = 0.9
LANES = 2
_S3 = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
_DIRECT = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@dataclass(frozen=True)
class Measured:
    """rows: {row: {median, min, max, unit, cpu_ms, did}}, cpu_ms per image over all our processes."""

    rows: dict[str, dict[str, Any]]
    title: str

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for column in ("row", "median", "min", "max", "unit", "CPU ms/image", "what it did"):
            table.add_column(column, justify="left" if column in ("row", "unit", "what it did") else "right")
        for name, row in self.rows.items():
            numbers = [f"{row[k]:.4g}" for k in ("median", "min", "max")]
            table.add_row(name, *numbers, row["unit"], f"{row['cpu_ms']:.2f}", row["did"])
        return table

    def text(self) -> str:
        local = self.rows["local"]
        lines = [
            f"{name} / local: {row['median'] / local['median']:.2f} (target: at least {TARGET:g}); by CPU time per image "
            f"{local['cpu_ms'] / row['cpu_ms']:.2f}"
            for name, row in self.rows.items()
            if name != "local"
        ]
        return "\n".join([*lines, *([] if "s3" in self.rows else ["s3: not measured, boto3 is not installed"])])


def bench(
    config: Config, *, latency: float = 30.0, workers: int = 2, batch: int = 50, passes: int = 5, limit: int = 4000,
    progress: bool = True,
) -> Measured:  # fmt: skip
    """Measure an epoch over the first shards of data.train that hold `limit` images. latency: ms per request. Raises DataError."""
    source = open_index(config.data.train, config.data.labels, verify=None, folder=config.data.index)
    if source.is_remote():
        raise DataError(f"bench remote: data.train={config.data.train} is remote itself; give shards of this machine")
    with tempfile.TemporaryDirectory(prefix="trilevel-bench-") as scratch, _far(Path(scratch), source, limit, latency) as where:
        streams, steps, count, shards = {}, 0, 0, 0
        for name, pattern in where.items():
            cache = Cache(Path(scratch, "cache", name), 1 << 40)
            index = build_index(pattern, config.data.labels, folder=f"{scratch}/index", cache=cache, progress=False)
            settings = _settings(config, name, pattern, Path(scratch), index, workers, batch)
            streams[name] = Stream(index, settings, 0, 1)
            steps, count, shards = streams[name].order(0, None).steps, len(index), len(index.names)
        rates, work = _passes(streams, Path(scratch, "cache"), passes, progress)
    did = {
        "local": "files of this machine, in its page cache",
        "http": f"http, {latency:g} ms per request, through an empty cache",
        "s3": f"s3 (boto3), {latency:g} ms per request, through an empty cache",
    }
    rows = {
        name: {
            "median": statistics.median(seen), "min": min(seen), "max": max(seen), "unit": "images/s",
            "cpu_ms": 1000 * statistics.median(work[name]), "did": did[name],
        }
        for name, seen in rates.items()
    }  # fmt: skip
    window = streams["local"].layout.window
    title = (
        f"{count} images in {shards} shards, {config.model.image_size} px, {workers} workers, batch {batch}, {LANES} lanes, windows of "
        f"{window}, {passes} passes of {steps} batches"
    )
    return Measured(rows, title)


def _settings(config: Config, name: str, pattern: str, scratch: Path, index: Index, workers: int, batch: int) -> Config:
    """The configuration with crop and flip only, one rank's lanes, and windows of at most a sixteenth of a lane: the first batch
    waits for the shards of the first windows (16 lanes of 4,096 are a twentieth of ImageNet)."""
    folder = None if name == "local" else str(scratch / "cache" / name)
    size = sum(s["bytes"] for s in index.shards)
    data = config.data.model_copy(update={
        "train": pattern, "batch": batch, "micro_batch": batch, "workers": workers, "lanes": LANES, "homes": 1, "repeats": 1,
        "window": max(1, min(config.data.window, len(index) // (16 * LANES))), "cache": folder, "cache_size": (size + 1) / 2**30,
    })  # fmt: skip
    model = config.model.model_copy(update={"classes": max(2, len(index.classes))})
    return config.model_copy(update={"augment": Augment(), "data": data, "model": model})


@contextmanager
def _far(scratch: Path, source: Index, limit: int, latency: float) -> Iterator[dict[str, str]]:
    """{row: pattern} of the first shards of `source`, served as long as this lasts."""
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
        yield found
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _passes(
    streams: dict[str, Stream], caches: Path, passes: int, progress: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Of every pass but the first: images per second, CPU seconds per image."""
    rates: dict[str, list[float]] = {name: [] for name in streams}
    work: dict[str, list[float]] = {name: [] for name in streams}
    with bar("bench remote", (passes + 1) * len(streams), "epochs", progress) as shown:
        for turn in range(passes + 1):
            for name, stream in streams.items():
                for held in caches.glob(f"{name}/shards/*.tar"):
                    held.unlink()
                busy, started, count = _cpu(), time.perf_counter(), 0
                for batch in stream.epoch(turn, None):
                    if batch.broken:
                        raise DataError(f"bench remote: {batch.broken[0][1]}")
                    count += len(batch.labels)
                if turn:
                    rates[name].append(count / (time.perf_counter() - started))
                    work[name].append((_cpu() - busy) / count)
                shown.advance(shown.task_ids[0])
    return rates, work


def _cpu() -> float:
    """CPU seconds of this process and its children so far, the server's left out."""
    process = psutil.Process()
    ours = [one for one in process.children(recursive=True) if "trainer.bench.latency_server" not in one.cmdline()]
    times = [one.cpu_times() for one in [process, *ours]]
    return sum(t.user + t.system for t in times)
