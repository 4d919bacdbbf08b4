"""Class folders as they are, without packing: an index in which each image file is a shard of one example.

Everything behind the index (order, labels, resume, audit) is as with shards. Slower: a file is opened for each image, where shards
give many images per read.
"""

from __future__ import annotations

import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from trainer.data.errors import DataError
from trainer.data.progress import progress_bar
from trainer.data.shards.layouts import class_folders, recognise
from trainer.data.shards.layouts.layout import Options
from trainer.data.shards.samples import fingerprint
from trainer.data.shards.scan import Scan
from trainer.data.shards.source_files import list_files
from trainer.data.shards.source_image import SourceImage


def scan_images(folder: str, workers: int, progress: bool) -> list[Scan]:
    """One scan per image of class folders; every file is read once, for its hash. Raises DataError: another layout, or splits."""
    files = list_files(folder, Path())
    layout = recognise(files).layout
    if layout not in (class_folders.OUTER, class_folders.INNER):
        raise DataError(f"{folder}: has the layout {layout.name}, which has to be packed: trilevel pack {folder} DST")
    splits = layout.read(files, Options()).splits
    if len(splits) != 1:
        raise DataError(f"{folder}: has the splits {', '.join(splits)}; give the folder of one, e.g. data.train={folder}/train")
    (images,) = splits.values()
    with ThreadPool(workers) as pool, progress_bar("index", len(images), "images", progress) as shown:
        scans = []
        for scan in pool.imap(_scan, sorted(images, key=lambda image: image.name), chunksize=32):
            scans.append(scan)
            shown.advance(shown.task_ids[0])
    return scans


def _scan(image: SourceImage) -> Scan:
    try:
        about, whole = os.stat(image.path), fingerprint(image.path, whole=True)
    except OSError as error:
        raise DataError(f"{image.path}: cannot be read: {error.strerror}; make it readable or remove it") from error
    key = image.key.encode("utf-8", "surrogateescape")
    record = {
        "name": image.name,
        "examples": 1,
        "bytes": about.st_size,
        "time": about.st_mtime_ns,
        "fast": whole,
        "whole": whole,
        "tag": "",
    }
    return Scan(
        record, np.zeros(1, np.int64), np.array([about.st_size], np.uint32), key, np.array([len(key)], np.int64), [image.label],
        np.zeros(1, np.int32),
    )  # fmt: skip
