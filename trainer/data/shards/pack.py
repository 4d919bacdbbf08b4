"""`trilevel pack`: images -> shuffled webdataset shards, classes.txt and index.

A shard is written under another name and renamed when it is complete, so running a killed command again continues it; the content of
a shard depends on the source, the seed and the settings only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import threading
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from webdataset.writer import TarWriter

from trainer.data.augment.decode import as_rgb, header
from trainer.data.errors import DataError
from trainer.data.keyed_hash import permutation
from trainer.data.progress import progress_bar
from trainer.data.shards.class_names import read_classes
from trainer.data.shards.hold_out import with_hold_out
from trainer.data.shards.index import Index, build_index, open_index
from trainer.data.shards.labels import class_numbers
from trainer.data.shards.layouts import read_source
from trainer.data.shards.source_image import SourceImage
from trainer.data.shards.split_summary import summary
from trainer.storage.disk import WRITING, atomic_write


def pack(
    src: str,
    dst: str | Path,
    *,
    labels: str | None = None,
    layout: str | None = None,
    name: str | None = None,
    hold_out: float | None = None,
    seed: int = 0,
    shard_size: int = 128 << 20,
    workers: int = 4,
    short_side: int | None = None,
    quality: int | None = None,
    progress: bool = True,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Index]:
    """Pack a source into `dst`: {split: its index}; shards `dst/SPLIT-000000.tar`, each about `shard_size` bytes of source.

    src: a folder or tar(.xz, .gz, .bz2) with one of the LAYOUTS, any folder or tar with `labels` (a file, see `label_table`), or
    `sklearn:digits`. Sources with folders train/, val/, test/ give several splits, others one called `name` (default: train), of which
    `hold_out` takes that share as `validation`, see `with_hold_out`.
    Splits packed into one `dst` share the order of classes. Images keep their bytes unless
    `short_side` (shrink to it, bicubic) or `quality` (JPEG, default 90) is given; the index records it. show: gets the layout, then what
    each split holds, line by line.
    Running it again continues after a kill, and returns at once if everything is packed. Raises DataError.
    """
    if shard_size < 1:
        raise DataError(f"pack --shard-size {shard_size / 2**20:g}: must be > 0, in MiB, e.g. 128")
    if short_side is not None and short_side < 1:
        raise DataError(f"pack --short-side {short_side}: must be >= 1 pixel, e.g. 256")
    if quality is not None and not 1 <= quality <= 100:
        raise DataError(f"pack --quality {quality}: must be from 1 to 100; the default is 90")
    dst = _folder(dst, name or "train")
    source = read_source(str(src), labels, name, seed, dst, layout)
    for line in (f"layout {source.found}", *source.notes):
        show(line)
    splits = source.splits if hold_out is None else with_hold_out(source.splits, hold_out, seed)
    number = _classes(dst, splits, source.numbers)
    packing = "" if short_side is None and quality is None else f"short side {short_side}, JPEG quality {quality or 90}"
    indexes = {}
    for split, part in splits.items():
        part.sort(key=lambda image: image.key)
        part = [part[i] for i in permutation(len(part), seed, len(part))]
        shards = -(-sum(image.length for image in part) // shard_size) or 1
        borders = np.arange(shards + 1) * len(part) // shards
        _same_plan(dst, split, str(src), part, [seed, shards, packing, sorted(number.items())])
        todo = [i for i in range(shards) if not _shard(dst, split, i).is_file()]
        with progress_bar(f"pack {split}", shards, "shards", progress) as shown:
            shown.advance(shown.task_ids[0], shards - len(todo))
            _write_all(
                [(_shard(dst, split, i), part[borders[i] : borders[i + 1]], number, short_side, quality) for i in todo],
                max(workers, 1),
                lambda: shown.advance(shown.task_ids[0]),
            )
        indexes[split] = _index(f"{dst}/{split}-*.tar", packing, bool(todo), workers, progress)
        for line in summary(split, indexes[split], part, dst):
            show(line)
        for left in dst.glob(f"{WRITING}{split}-*.tar.*"):  # left by a killed pack
            left.unlink()
    for left in dst.glob(".*.unpacked"):
        left.unlink()
    return indexes


def _folder(dst: str | Path, name: str) -> Path:
    """The folder of the shards, made; raises DataError for names that a shard pattern would misread."""
    dst = Path(dst)
    if set("*?[]{},") & set(f"{dst}{name}") or not re.fullmatch(r"\w+", name):
        raise DataError(
            f"pack into {dst}, --name {name}: neither may contain any of *?[]{{}}, which are wildcards of shard patterns, and --name "
            "must be one word (`train-*.tar` would match the shards of `train-extra` too)"
        )
    try:
        dst.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"pack into {dst}: {error.strerror}") from error
    return dst


def _write_all(jobs: list[tuple[Any, ...]], workers: int, done: Callable[[], None]) -> None:
    """`_write` for each of these arguments; `done` after each shard. After a failure no other shard is begun. The threads are daemons, so
    Ctrl-C does not wait for the shards that are being written: the next pack removes them."""
    failed = threading.Event()

    def write(job: tuple[Any, ...]) -> None:
        if not failed.is_set():
            _write(*job)

    with ThreadPool(workers) as pool:
        try:
            for _ in pool.imap_unordered(write, jobs):
                done()
        except Exception:
            failed.set()
            pool.close()
            pool.join()
            raise


def _shard(dst: Path, split: str, i: int) -> Path:
    return dst / f"{split}-{i:06d}.tar"


def _index(pattern: str, packing: str, changed: bool, workers: int, progress: bool) -> Index:
    if not changed:
        try:
            return open_index(pattern)
        except DataError:
            pass  # killed between the last shard and the index
    return build_index(pattern, workers=max(workers, 1), packing=packing, progress=progress)


def _classes(dst: Path, splits: dict[str, list[SourceImage]], numbers: bool) -> dict[str, int]:
    """{label text: number}; classes.txt is written once, for all splits packed into `dst`."""
    listed, texts = dst / "classes.txt", {image.label for part in splits.values() for image in part}
    known = read_classes(listed.read_bytes(), str(listed)) if listed.is_file() else None
    strange = next((i for part in splits.values() for i in part if known and not numbers and i.label not in known), None)
    if strange is not None:
        raise DataError(
            f"pack into {dst}: class {strange.label!r} is not among the {len(known or ())} classes of {listed}, e.g. of "
            f"{strange.name!r}; if its folder is not the class, pass --labels FILE, which gives each image its class; another data "
            "set needs another folder"
        )
    if known is None and len(texts) == 1:
        count = sum(map(len, splits.values()))
        raise DataError(
            f"pack into {dst}: all {count} images have one class, {min(texts)!r}, must be >= 2; if that is not their class, pass --labels "
            "FILE, or pack the training images into this folder first"
        )
    number, classes = class_numbers(texts, "file" if numbers else "key", known, f"pack into {dst}")
    if known is None:
        _replace(listed, "".join(f"{c}\n" for c in classes).encode())
    return number


def _same_plan(dst: Path, split: str, src: str, part: list[SourceImage], settings: list[object]) -> None:
    """Record source and settings of a split's shards; raises DataError if its shards have others, or another split the same images."""
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    for image in part:
        digest.update(f"{image.key}\0{image.label}\0{image.length}\n".encode("utf-8", "surrogateescape"))
    plan, file = {"source": src, "images": len(part), "hash": digest.hexdigest()}, dst / f".{split}.plan.json"
    shards = list(dst.glob(f"{split}-*.tar"))
    there = _recorded(file)
    if shards and there.get("hash") != plan["hash"]:
        raise DataError(
            f"pack into {dst}: {split} shards of another source or setting exist "
            f"({there.get('source', 'unknown source')}); use another --name or folder, "
            f"or remove {dst}/{split}-*.tar"
        )
    twice = next((o for o in sorted(dst.glob(".*.plan.json")) if o != file and _recorded(o).get("hash") == plan["hash"]), None)
    if twice:
        raise DataError(
            f"pack into {dst}: {split} has the same images as {twice.name.split('.')[1]}; give the source of {split}, or pack once with "
            "--hold-out 0.1, which makes a validation split"
        )
    if there != plan:
        _replace(file, json.dumps(plan).encode())


def _recorded(file: Path) -> dict[str, Any]:
    """The plan in this file; {} if there is none, or not one that a pack wrote."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if file.is_file() and isinstance(plan := json.loads(file.read_text()), dict):
            return plan
    return {}


def _replace(path: Path, data: bytes) -> None:
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        remedy = "move it away" if path.is_dir() else "free disk space or make the folder writable"
        raise DataError(f"pack into {path.parent}: writing {path.name}: {error.strerror}; {remedy}") from error


def _write(path: Path, part: list[SourceImage], number: dict[str, int], short_side: int | None, quality: int | None) -> None:
    try:
        with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
            for image in part:
                data, extension = image.read(), image.extension
                if len(data) != image.length:
                    raise DataError(f"pack: {image.path} changed while packing; run the same command again")
                if short_side is not None or quality is not None:
                    data, extension = _smaller(data, extension, short_side, quality or 90)
                tar.write({"__key__": image.key, extension: data, "cls": str(number[image.label]).encode()})
    except OSError as error:
        raise DataError(f"pack: writing {path}: {error}; finished shards are kept, run the same command again") from error


def _smaller(data: bytes, extension: str, short_side: int | None, quality: int) -> tuple[bytes, str]:
    """Shrink and encode as JPEG. A broken image is kept unchanged: `trilevel verify` and the run report it."""
    try:
        image = header(data)  # only the formats that training reads: PIL's EPS plugin starts Ghostscript
        if short_side is not None and min(image.size) > short_side:
            scale = short_side / min(image.size)
            size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
            image = as_rgb(image).resize(size, PIL.Image.Resampling.BICUBIC)
        elif short_side is not None:
            return data, extension
        file = io.BytesIO()
        as_rgb(image).save(file, "JPEG", quality=quality)
    except Exception:  # decoders raise arbitrary exceptions on damaged bytes
        return data, extension
    return file.getvalue(), "jpg"
