"""The scan of one shard for the index: offsets of its images, their keys and labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.shards.label_file import label_table
from trainer.data.shards.samples import Sample, fingerprint, samples


class Scan(NamedTuple):
    """The n examples of one shard. values: distinct label texts; label: (n,) position in values."""

    shard: dict[str, Any]
    offset: np.ndarray
    length: np.ndarray
    keys: bytes
    key_length: np.ndarray
    values: list[str]
    label: np.ndarray


def scan_shard(path: Path, name: str, source: Callable[[Path, Sample], str]) -> Scan:
    stat = path.stat()
    found = list(samples(path))
    values, label = _distinct([source(path, s) for s in found])
    keys = [s.key.encode("utf-8", "surrogateescape") for s in found]
    record = {
        "name": name,
        "examples": len(found),
        "bytes": stat.st_size,
        "time": stat.st_mtime_ns,
        "fast": fingerprint(path),
        "whole": fingerprint(path, whole=True),
    }
    return Scan(
        record,
        np.array([s.image.offset for s in found], dtype=np.int64),
        np.array([s.image.length for s in found], dtype=np.uint32),
        b"".join(keys),
        np.array([len(k) for k in keys], dtype=np.int64),
        values,
        label,
    )


def _distinct(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """(distinct texts, (n,) int32: the position of each text among them)."""
    places: dict[str, int] = {}
    label = np.array([places.setdefault(text, len(places)) for text in texts], dtype=np.int32)
    return list(places), label


def with_labels(path: Path, scans: list[Scan]) -> list[Scan]:
    """Fill in labels from a label file."""
    keys = []
    for scan in scans:
        ends = np.cumsum(scan.key_length)
        keys.append(
            [scan.keys[b - n : b].decode("utf-8", "surrogateescape") for b, n in zip(ends, scan.key_length, strict=True)]
        )
    table = label_table(path, [k for part in keys for k in part])
    filled = []
    for scan, part in zip(scans, keys, strict=True):
        values, label = _distinct([table[k] for k in part])
        filled.append(scan._replace(values=values, label=label))
    return filled
