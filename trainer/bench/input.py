"""`trilevel bench input`: images per second of our loader, of decoding alone, and of other loaders, in one run.

All rows use the same images at the same size with the same number of workers; passes are interleaved, the first one is the warm-up,
medians are reported, and only ratios within one run are meaningful. Work that a loader leaves to the device (normalise, flip,
erase, mix) is not included; the table describes the work of each row.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from sparsity.types import Selection
from trainer.bench import input_peers
from trainer.bench.input_peers import PEERS, Peer, PeerInput
from trainer.bench.pixel_errors import pixel_errors
from trainer.bench.result import SPREAD, BenchResult, stats
from trainer.config.run_config import Config
from trainer.config.schema import AugmentConfig
from trainer.data.augment import turbojpeg
from trainer.data.errors import DataError
from trainer.data.loader.build import training_stream
from trainer.data.loader.dataset import opened
from trainer.data.shards.index import Index
from trainer.data.shards.pack import pack
from trainer.data.shards.reader import Reader
from trainer.telemetry.timing import cpu_seconds, interleave

POLICY = "rand-m9-mstd0.5-inc1"
DROPPED, SHORT_SIDE = 0.2, 256
_LEFT = "the same with data.decode_on=device, which leaves JPEGs to the device"
COLUMNS = SPREAD | {"CPU ms/image": "{cpu_ms:.2f}", "what it did": "{did}"}
RATIOS = (  # row, over which row
    ("ours", "webdataset"),
    ("ours", "imagefolder"),
    ("ours", "timm"),
    ("ours", "mosaicml_streaming"),
    ("ours", "litdata"),
    ("ours", "bare_decode"),
    ("ours_short_side", "ours"),
    ("ours_jpegs", "ours"),
    ("ours_on_device", "ours"),
    ("ours_randaugment", "timm_randaugment"),
    ("epoch_dropped", "epoch_all"),
)


def bench(
    config: Config, *, images: str | None = None, workers: int = 2, batch: int = 50, passes: int = 5, limit: int = 2000,
    only: list[str] | None = None, progress: bool = True,
) -> BenchResult:  # fmt: skip
    """Measure all rows (or those in `only`).

    images: a folder or tar; None: the first `limit` images of data.train.
    workers, batch: worker processes and batch size of every loader.
    passes: measured passes.
    progress: show a progress bar.
    Writes three copies of the images to the temporary folder. Raises DataError.
    """
    with tempfile.TemporaryDirectory(prefix="trilevel-bench-") as scratch:
        place = _place(Path(scratch), config, images, batch, workers, limit)
        known = _rows(place, config, Path(scratch))
        if unknown := sorted(set(only or []) - known.keys()):
            raise DataError(f"--rows: unknown value {', '.join(unknown)!r}; valid values: {', '.join(known)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' own
            peers = {name: make() for name, make in known.items() if not only or name in only}
            rows = measured(peers, passes, "bench input" if progress else None)
        errors = pixel_errors(place.index, place.size)
    title = f"{len(place.index)} images, {place.size} px, {workers} workers, batch {batch}, {passes} passes"
    return BenchResult(title, rows, COLUMNS, [*ratios(rows, RATIOS), *errors])


def measured(peers: dict[str, Peer], passes: int, show: str | None, without: int | None = None) -> dict[str, dict[str, Any]]:
    """Rows {median, min, max, unit, cpu_ms (per image, of all our processes, median), did}; for a library that is not installed
    {unit, did}. Unit: images/s, or seconds for rows whose name starts with `epoch`. without: see `cpu_seconds`."""
    rows: dict[str, dict[str, Any]]
    rows = {name: {"unit": "s" if name.startswith("epoch") else "images/s", "did": peer.did} for name, peer in peers.items()}
    passed = {name: partial(_pass, peer, without) for name, peer in peers.items() if peer.epoch is not None}
    for name, found in interleave(passed, passes, warm_up=1, show=show).items():
        unit = rows[name]["unit"]
        values = [seconds if unit == "s" else images / seconds for images, seconds, _ in found]
        rows[name] |= stats(values, unit) | {"cpu_ms": 1000 * median(work / images for images, _, work in found)}
    return rows


def _pass(peer: Peer, without: int | None) -> tuple[int, float, float]:
    """Images, seconds, CPU seconds of a pass."""
    peer.prepare()
    busy, started = cpu_seconds(without), time.perf_counter()
    images = peer.epoch() if peer.epoch is not None else 0
    seconds = time.perf_counter() - started
    return images, seconds, cpu_seconds(without) - busy


def ratios(rows: dict[str, dict[str, Any]], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Ratios of the medians of the rows that were measured, and of images per processor time."""
    return [
        f"{a} / {b}: {rows[a]['median'] / rows[b]['median']:.2f}; by CPU time per image {rows[b]['cpu_ms'] / rows[a]['cpu_ms']:.2f}"
        for a, b in pairs
        if "median" in rows.get(a, {}) and "median" in rows.get(b, {})
    ]


def _rows(place: PeerInput, config: Config, scratch: Path) -> dict[str, Callable[[], Peer]]:
    def short() -> Peer:
        index = pack(
            str(place.folder),
            scratch / "short",
            short_side=SHORT_SIDE,
            workers=place.workers,
            shard_size=_shard_size(place.index.length, place.workers),
            progress=False,
        )["train"]
        return _ours(place._replace(shards=f"{scratch}/short/train-*.tar", index=index), config, did=f"ours, {index.packing}")

    some = _selection(len(place.index))
    return {
        "ours": partial(_ours, place, config),
        **{name: partial(make, place) for name, make in PEERS.items()},
        "ours_short_side": short,
        "ours_jpegs": partial(_ours, place, config, decode_on="nowhere", did=f"{_LEFT}: the workers' part alone"),
        **({"ours_on_device": partial(_ours, place, config, decode_on="device", did=f"{_LEFT}, which decodes, crops and resizes them")}
           if torch.cuda.is_available() else {}),
        "ours_randaugment": partial(_ours, place, config, policy=POLICY),
        "timm_randaugment": partial(input_peers.timm, place, POLICY),
        "epoch_all": partial(_ours, place, config, did="ours, seconds for a whole epoch"),
        "epoch_dropped": partial(_ours, place, config, selection=some, did=f"the same with {DROPPED:.0%} of the examples dropped"),
    }  # fmt: skip


def _ours(
    place: PeerInput, config: Config, policy: str = "none", selection: Selection | None = None, did: str = "", decode_on: str = "workers"
) -> Peer:  # fmt: skip
    """The loader of a training run on one rank, with its augmentation reduced to crop, flip and `policy`. decode_on: `nowhere` leaves JPEGs
    to a device that does nothing."""
    data = {
        "decode_on": decode_on.replace("nowhere", "device"),
        "train": place.shards, "batch": place.batch, "micro_batch": place.batch, "workers": place.workers, "lanes": 2,
        "homes": 1, "repeats": 1, "labels": "cls",
    }  # fmt: skip
    model = {"classes": max(2, len(place.index.classes)), "image_size": place.size}
    plain = AugmentConfig(policy=policy, interpolation="bicubic")
    stream = training_stream(place.index, config.changed(augment=plain, data=data, model=model), 0, 1)
    if decode_on == "nowhere":
        stream.decode = None
    turns = iter(range(1 << 30))

    def epoch() -> int:
        return sum(len(batch.labels) for batch in stream.epoch(next(turns), selection))

    decoder = "TurboJPEG of the crop alone" if turbojpeg.library() else "PIL of the whole image"
    work = f"our loader: coalesced reads, {decoder}, crop and resize in uint8; uint8 batches; flip is left to the device"
    return Peer(did or (work if policy == "none" else f"the same with {policy} on PIL (timm's operations, keyed)"), epoch)


def _selection(examples: int) -> Selection:
    keep = np.ones(examples, dtype=bool)
    keep[np.random.default_rng(0).permutation(examples)[: round(DROPPED * examples)]] = False
    return Selection(np.packbits(keep, bitorder="little"), int(keep.sum()), None, {})


def _place(scratch: Path, config: Config, images: str | None, batch: int, workers: int, limit: int) -> PeerInput:
    """Shards and class folders of the same images."""
    if images is None:
        source = opened(config.data.train, config.data, None)
    else:
        source = pack(images, scratch / "source", workers=max(workers, 1), progress=False)["train"]
        limit = len(source)
    count = min(limit, len(source))
    if count < 2 * batch:
        raise DataError(
            f"bench input: {count} images are fewer than two batches of {batch}; give more images, or lower --batch"
        )
    folder = _unpacked(source, count, scratch / "folder")
    size = _shard_size(source.length[:count], workers)
    index = pack(str(folder), scratch / "shards", workers=max(workers, 1), shard_size=size, progress=False)["train"]
    return PeerInput(f"{scratch}/shards/train-*.tar", folder, index, config.model.image_size, batch, workers)


def _shard_size(lengths: np.ndarray, workers: int) -> int:
    """Bytes of a shard, for eight shards per worker."""
    return int(lengths.astype(np.int64).sum()) // (8 * max(workers, 1)) + 1


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
