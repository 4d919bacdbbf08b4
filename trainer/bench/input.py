"""`trilevel bench input`: images per second of our stream, of decoding alone, and of the loaders people use, in one run.

All rows take the same images at the same size with the same number of workers; passes are interleaved, the first one warms up,
medians are taken, and only ratios of one run count. Device work (normalise, flip, erase, mix) is no part of a row where a loader
leaves it to the device; what each row did is printed beside it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.table import Table

from sparsity.types import Selection
from trainer.bench import input_peers
from trainer.bench.input_peers import PEERS, Peer, Place
from trainer.bench.pixel_errors import pixel_errors
from trainer.config.run_config import Config
from trainer.config.schema import Augment
from trainer.data.augment import turbojpeg
from trainer.data.errors import DataError
from trainer.data.loader.dataset import opened
from trainer.data.loader.stream import Stream
from trainer.data.progress import bar
from trainer.data.shards.index import Index
from trainer.data.shards.pack import pack
from trainer.data.shards.reader import Reader

POLICY = "rand-m9-mstd0.5-inc1"
DROPPED, SHORT_SIDE = 0.2, 256
_TARGETS = (  # row, over which row, at least (the loader is as fast as decoding allows)
    ("ours", "webdataset", 2.2),
    ("ours", "imagefolder", 1.8),
    ("ours", "timm", 1.8),
    ("ours", "mosaicml_streaming", 1.8),
    ("ours", "litdata", 1.8),
    ("ours", "bare_decode", 0.6),
    ("ours_short_side", "ours", 2.0),
    ("ours_randaugment", "timm_randaugment", 1.5),
    ("epoch_dropped", "epoch_all", 1 - 0.18),
)


@dataclass(frozen=True)
class Measured:
    """rows: {row: {median, min, max, unit, cpu_ms, did}}, cpu_ms per image over all processes; a row without a median was not
    measured, `did` says why."""

    rows: dict[str, dict[str, Any]]
    title: str
    errors: list[str] = field(default_factory=list)  # of the fast paths' pixels against PIL's, a line each

    def ratios(self) -> list[tuple[str, str, float, float]]:
        """(row, over, ratio of medians, target); an epoch's time must be below its target, a rate above."""
        have = {name for name, row in self.rows.items() if "median" in row}
        return [(a, b, self.rows[a]["median"] / self.rows[b]["median"], target) for a, b, target in _TARGETS if {a, b} <= have]

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for column in ("row", "median", "min", "max", "unit", "CPU ms/image", "what it did"):
            table.add_column(column, justify="left" if column in ("row", "unit", "what it did") else "right")
        for name, row in self.rows.items():
            numbers = [f"{row[k]:.4g}" if k in row else "" for k in ("median", "min", "max")]
            table.add_row(name, *numbers, row["unit"], f"{row['cpu_ms']:.2f}" if "cpu_ms" in row else "", row["did"])
        return table

    def text(self) -> str:
        lines = []
        for a, b, ratio, target in self.ratios():
            word = "at most" if a.startswith("epoch") else "at least"
            work = self.rows[b]["cpu_ms"] / self.rows[a]["cpu_ms"]
            lines.append(f"{a} / {b}: {ratio:.2f} (target: {word} {target:g}); by CPU time per image {work:.2f}")
        return "\n".join(lines + self.errors)


def bench(
    config: Config, *, images: str | None = None, workers: int = 2, batch: int = 50, passes: int = 5, limit: int = 2000,
    only: list[str] | None = None, progress: bool = True,
) -> Measured:  # fmt: skip
    """Measure all rows (or those in `only`). images: a folder or tar; None: the first `limit` images of data.train.

    Needs room in the temporary folder for three copies of the images. Raises DataError.
    """
    with tempfile.TemporaryDirectory(prefix="trilevel-bench-") as scratch:
        place = _place(Path(scratch), config, images, batch, workers, limit)
        known = _rows(place, config, Path(scratch))
        if unknown := sorted(set(only or []) - known.keys()):
            raise DataError(f"bench input: no row {', '.join(unknown)}; there are {', '.join(known)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' own
            peers = {name: make() for name, make in known.items() if not only or name in only}
            rates, work = _passes(peers, passes, progress)
        errors = pixel_errors(place.index, place.size)
    rows: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        unit = "s" if name.startswith("epoch") else "images/s"
        seen = rates[name]
        numbers = {"median": statistics.median(seen), "min": min(seen), "max": max(seen)} if seen else {}
        cpu = {"cpu_ms": 1000 * statistics.median(work[name])} if seen else {}
        rows[name] = numbers | {"unit": unit, **cpu, "did": peer.did}
    title = f"{len(place.index)} images, {place.size} px, {workers} workers, batch {batch}, {passes} passes"
    return Measured(rows, title, errors)


def _passes(peers: dict[str, Peer], passes: int, progress: bool) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Of every pass but the first: rates (times, for rows that begin with `epoch`), and CPU seconds per image of all processes."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    work: dict[str, list[float]] = {name: [] for name in peers}
    with bar("bench input", (passes + 1) * len(peers), "passes", progress) as shown:
        for turn in range(passes + 1):
            for name, peer in peers.items():
                if peer.epoch is not None:
                    busy, started = _cpu(), time.perf_counter()
                    count = peer.epoch()
                    seconds = time.perf_counter() - started
                    if turn:
                        found[name].append(seconds if name.startswith("epoch") else count / seconds)
                        work[name].append((_cpu() - busy) / count)
                shown.advance(shown.task_ids[0])
    return found, work


def _cpu() -> float:
    """CPU seconds of this process and its workers so far: what a neighbour on the machine hardly changes."""
    process = psutil.Process()
    times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
    return sum(t.user + t.system for t in times) + times[0].children_user + times[0].children_system


def _rows(place: Place, config: Config, scratch: Path) -> dict[str, Callable[[], Peer]]:
    def short() -> Peer:
        index = pack(
            str(place.folder),
            scratch / "short",
            short_side=SHORT_SIDE,
            workers=place.workers,
            shard_size=_share(place),
            progress=False,
        )["train"]
        return _ours(place._replace(shards=f"{scratch}/short/train-*.tar", index=index), config, did=f"ours, {index.packing}")

    some = _selection(len(place.index))
    return {
        "ours": partial(_ours, place, config),
        **{name: partial(make, place) for name, make in PEERS.items()},
        "ours_short_side": short,
        "ours_randaugment": partial(_ours, place, config, policy=POLICY),
        "timm_randaugment": partial(input_peers.timm, place, POLICY),
        "epoch_all": partial(_ours, place, config, did="ours, seconds for a whole epoch"),
        "epoch_dropped": partial(_ours, place, config, selection=some, did=f"the same with {DROPPED:.0%} of the examples dropped"),
    }  # fmt: skip


def _ours(place: Place, config: Config, policy: str = "none", selection: Selection | None = None, did: str = "") -> Peer:
    """The stream of the main job on one rank, with its augmentation reduced to crop, flip and `policy`."""
    plain = Augment(policy=policy, interpolation="bicubic")
    data = config.data.model_copy(update={
        "train": place.shards, "batch": place.batch, "micro_batch": place.batch, "workers": place.workers, "lanes": 2,
        "homes": 1, "repeats": 1, "labels": "cls",
    })  # fmt: skip
    model = config.model.model_copy(update={"classes": max(2, len(place.index.classes)), "image_size": place.size})
    stream = Stream(place.index, config.model_copy(update={"augment": plain, "data": data, "model": model}), 0, 1)
    turns = iter(range(1 << 30))

    def epoch() -> int:
        return sum(len(batch.labels) for batch in stream.epoch(next(turns), selection))

    decoder = "TurboJPEG of the crop alone" if turbojpeg.library() else "torchvision decode_jpeg"
    said = f"our stream: coalesced reads, {decoder}, crop and resize in uint8, keyed draws; uint8 batches, flip drawn"
    return Peer(did or (said if policy == "none" else f"the same with {policy} on PIL (timm's operations, keyed)"), epoch)


def _selection(examples: int) -> Selection:
    keep = np.ones(examples, dtype=bool)
    keep[np.random.default_rng(0).permutation(examples)[: round(DROPPED * examples)]] = False
    return Selection(np.packbits(keep, bitorder="little"), int(keep.sum()), None, {})


def _place(scratch: Path, config: Config, images: str | None, batch: int, workers: int, limit: int) -> Place:
    """Shards and class folders of the same images."""
    if images is None:
        source = opened(config.data.train, config, None)
    else:
        source = pack(images, scratch / "source", workers=max(workers, 1), progress=False)["train"]
        limit = len(source)
    count = min(limit, len(source))
    if count < 2 * batch:
        raise DataError(f"bench input: {count} images make no two batches of {batch}; give more, or a smaller --batch")
    folder = _unpacked(source, count, scratch / "folder")
    size = int(source.length[:count].astype(np.int64).sum())
    shards = scratch / "shards"
    index = pack(str(folder), shards, workers=max(workers, 1), shard_size=size // (8 * max(workers, 1)) + 1, progress=False)[
        "train"
    ]
    return Place(f"{shards}/train-*.tar", folder, index, config.model.image_size, batch, workers)


def _share(place: Place) -> int:
    return int(place.index.length.astype(np.int64).sum()) // (8 * max(place.workers, 1)) + 1


def _unpacked(index: Index, count: int, folder: Path) -> Path:
    reader = Reader(index)
    for number in range(count):
        data = reader.read(np.array([number]))[0]
        if isinstance(data, memoryview):
            path = folder / f"c{int(index.labels[number]):05d}" / f"{number:08d}.{_extension(data)}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def _extension(data: memoryview) -> str:
    starts = {b"\x89PNG": "png", b"RIFF": "webp"}
    return starts.get(bytes(data[:4]), "jpg")
