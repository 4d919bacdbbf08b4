"""The index: offset, length, key and label of every example of a set of shards; memory-mapped, 24 bytes an example.

It is one file beside the shards (`train.index` for `train-*.tar`), or in a local folder (see `location`; its format: `index_file`). A
shard that changed after indexing is an error at the start of a run, with the shard's name.
"""

from __future__ import annotations

import os
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.data.errors import DataError, Forbidden
from trainer.data.progress import progress_bar
from trainer.data.remote.cache import Cache, Source, cache_at
from trainer.data.remote.client import stat
from trainer.data.remote.url import scheme
from trainer.data.shards import index_file
from trainer.data.shards.image_folder import scan_images
from trainer.data.shards.labels import class_numbers, label_of
from trainer.data.shards.location import ShardSet, hash_of, joined, locate_shards
from trainer.data.shards.samples import fingerprint
from trainer.data.shards.scan import Scan, scan_shard, with_labels

_BUDGET = 2 << 30  # bytes of shards with a new time stamp that the fast check reads completely


class Index:
    """An opened index. root: directory or URL of the shards; names: relative to it. sizes: (S,) int64 examples per shard;
    first: (S + 1,) int64 first id of each; offset (N,) int64, length (N,) uint32: an image in its shard; labels: (N,) int32;
    classes: names in label order; packing: how pixels were changed when packed ("" = not); fingerprint: of names, bytes and
    labels. Cheap to pickle: unpickling opens the file again. Raises DataError for a damaged file, ending with `remedy`."""

    def __init__(self, path: str | Path, root: str | None = None, remedy: str = "run `trilevel index` on its shards") -> None:
        """root: None = the shards lie beside the index. Not stored in the file, which may come from another user."""
        self.path = Path(path)
        header, arrays, self.seal = index_file.read(self.path, remedy)
        self.root = str(self.path.parent) if root is None else root
        self.label_source: str = header["labels"]
        self.packing: str = header["packing"]
        self.classes: list[str] = header["classes"]
        self.shards: list[dict[str, Any]] = header["shards"]
        self.fingerprint = index_file.fingerprint(self.shards, arrays["label"])
        self.names: list[str] = [s["name"] for s in self.shards]
        self.sizes = np.array([s["examples"] for s in self.shards], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.offset, self.length, self.labels = arrays["offset"], arrays["length"], arrays["label"]
        self._key_end, self._keys = arrays["key_end"], arrays["keys"]

    def __len__(self) -> int:
        return int(self.first[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.root, self.seal)

    def key(self, example: int) -> str:
        begin = int(self._key_end[example - 1]) if example else 0
        return self._keys[begin : int(self._key_end[example])].tobytes().decode("utf-8", "surrogateescape")

    def shard_of(self, ids: np.ndarray | int) -> np.ndarray:
        """Number of the shard of each id."""
        return np.searchsorted(self.first, ids, side="right") - 1

    def is_remote(self) -> bool:
        return bool(scheme(self.root) or scheme(self.names[0]))

    def is_files(self) -> bool:
        """Whether each example is an image file of its own, in class folders."""
        return not self.is_remote() and len(self.names) == len(self) and not self.names[0].endswith(".tar")

    def source(self, shard: int) -> Source:
        """A shard's URL or path, its size and hash."""
        name = self.names[shard]
        url = name if scheme(name) else joined(self.root, name)
        return Source(url, self.shards[shard]["bytes"], self.shards[shard]["whole"])

    def where(self, example: int) -> str:
        """Shard and key of an example, for messages."""
        return f"{self.names[int(self.shard_of(example))]} key {self.key(example)!r}"


def _reopen(path: Path, root: str, seal: str) -> Index:
    index = Index(path, root)
    if index.seal != seal:
        raise DataError(f"index {path}: changed while it was in use; start the run again")
    return index


def build_index(
    pattern: str,
    labels: str = "cls",
    *,
    workers: int = 8,
    packing: str = "",
    progress: bool = True,
    folder: str | None = None,
    cache: Cache | None = None,
) -> Index:
    """Read the headers and labels of all shards once, in parallel, write the index and open it.

    labels: "cls" (member .cls), "json:FIELD" (member .json), "key" (the key's directory, else its start up to "_"), or
    "file:PATH" (lines `key label`, or one label per line for the keys in sorted order). Integers from .cls, JSON or a file are
    class numbers; other texts are names, and classes are the sorted names, or those of `classes.txt` beside the shards if
    it exists, so that training and validation agree. folder: of the index, see `locate_shards`. Remote shards
    are downloaded into `cache` (None: the default one), which keeps as many as fit. A folder of class folders without tars is indexed
    file by file. Raises DataError.
    """
    shard_set = locate_shards(pattern, folder)
    if shard_set.files:
        if labels != "cls":
            raise DataError(
                f"{pattern}: labels {labels!r} of a folder of images, whose class is its folder; leave --labels out"
            )
        return _write_index(pattern, shard_set, scan_images(pattern, workers, progress), labels, packing)
    source, cache = label_of(labels), cache or cache_at(None, 64)

    def scan(name: str) -> Scan:
        with shard_set.opened(name, cache) as (path, about):
            scanned = scan_shard(path, name, source)
            return scanned._replace(shard=scanned.shard | {"tag": about.tag})

    # daemon threads: Ctrl-C ends the command even while a server blocks one
    with ThreadPool(workers) as pool, progress_bar("index", len(shard_set.names), "shards", progress) as shown:
        scans = []
        for one in pool.imap(scan, shard_set.names):
            scans.append(one)
            shown.advance(shown.task_ids[0])
    if not any(len(scan.offset) for scan in scans):
        raise DataError(f"shards {pattern!r}: no examples found; check that packing finished")
    if labels.startswith("file:"):
        scans = with_labels(Path(labels.removeprefix("file:")), scans)
    return _write_index(pattern, shard_set, scans, labels, packing)


def _write_index(pattern: str, shard_set: ShardSet, scans: list[Scan], labels: str, packing: str) -> Index:
    texts = {text for scan in scans for text in scan.values}
    kind = "key" if shard_set.files else labels  # the names of folders are names, also where they are digits
    number, classes = class_numbers(texts, kind, _class_names(shard_set, texts, kind), f"shards {pattern!r}")
    arrays = {
        "offset": np.concatenate([s.offset for s in scans]),
        "length": np.concatenate([s.length for s in scans]),
        "label": np.concatenate([np.array([number[v] for v in s.values], dtype=np.int32)[s.label] for s in scans]),
        "key_end": np.cumsum(np.concatenate([s.key_length for s in scans]), dtype=np.int64),
        "keys": np.frombuffer(b"".join(s.keys for s in scans), dtype=np.uint8),
    }
    header = {"labels": labels, "packing": packing, "classes": classes, "shards": [s.shard for s in scans]}
    index_file.write(shard_set.index, header, arrays)
    return Index(shard_set.index, shard_set.root)


def _class_names(shard_set: ShardSet, texts: set[str], labels: str) -> list[str] | None:
    """The names in `classes.txt`, None = no such file. Raises DataError if the server refuses it and labels are names: without the file
    their numbers could be others than in validation; numbers need no file."""
    try:
        return shard_set.classes()
    except Forbidden as error:
        if labels != "key" and all(text.isascii() and text.isdecimal() for text in texts):
            return None
        raise DataError(
            f"{error}. It orders the classes of these labels, which are names; allow reading it, or, if it does not exist, upload one "
            "or allow listing (s3:ListBucket: without it S3 answers 403 for a missing file)"
        ) from error


def open_index(
    pattern: str,
    labels: str = "cls",
    verify: Literal["fast", "full"] | None = "fast",
    workers: int = 16,
    folder: str | None = None,
) -> Index:
    """Open the index of these shards and check the shards against it. Raises DataError naming the first shard that differs.

    fast: names, sizes, a hash of 16 blocks, and all bytes of shards with a new time stamp (up to 2 GiB of them); full: all
    bytes; None: names and sizes (for all ranks of a node but the first). For remote shards fast requests sizes and tags, None
    makes no request: their hash is checked at every download. folder: of the index, see `locate_shards`.
    """
    shard_set = locate_shards(pattern, folder)
    root, again = shard_set.root, f"run `trilevel index {pattern!r}{'' if labels == 'cls' else f' --labels {labels!r}'}`"
    index = _index_of(shard_set, again)
    if index is None:
        raise DataError(f"shards {pattern!r}: index {shard_set.index} not found; {again}")
    path = index.path
    if index.label_source != labels:
        raise DataError(f"index {path} has labels from {index.label_source!r}, data.labels={labels!r}; set that or {again}")
    for name in sorted(set(shard_set.names) - set(index.names)):
        raise DataError(f"shard {joined(root, name)} is not in the index {path}; {again}")
    for name in sorted(set(index.names) - set(shard_set.names)):
        raise DataError(f"shard {joined(root, name)} is in the index {path}, but missing in {pattern!r}; restore it or {again}")
    if shard_set.is_remote() and verify is None:
        return index

    with ThreadPool(workers) as pool:
        budget = 0
        checks = []
        for shard, (size, stamp) in zip(index.shards, pool.imap(lambda s: _now(shard_set, s), index.shards), strict=True):
            if size is not None and size != shard["bytes"]:
                raise DataError(
                    f"shard {shard_set.url(shard['name'])} changed: {size} bytes, {shard['bytes']} in the index; "
                    f"restore it or {again}"
                )
            touched = stamp != shard["tag" if shard_set.is_remote() else "time"] and budget + shard["bytes"] <= _BUDGET
            budget += shard["bytes"] * touched
            checks.append((shard, "whole" if verify == "full" or touched else "fast"))

        def same(check: tuple[dict[str, Any], str]) -> bool:
            shard, kind = check
            if shard_set.files and kind == "fast":
                return True  # size and time stamp are equal; to read all files would take as long as to index them
            url = shard_set.url(shard["name"])
            if shard_set.is_remote():
                return kind == "fast" or hash_of(url) == shard["whole"]
            try:
                return fingerprint(url, whole=kind == "whole") == shard[kind]
            except OSError as error:
                raise DataError(f"shard {url}: cannot be read: {error.strerror}") from error

        if verify is not None:
            for (shard, _), good in zip(checks, pool.imap(same, checks), strict=True):
                if not good:
                    raise DataError(f"shard {shard_set.url(shard['name'])} changed since it was indexed; restore it or {again}")
    return index


def _index_of(shard_set: ShardSet, remedy: str) -> Index | None:
    """The index of a pattern, or that of `train-*.tar` (as `trilevel pack` writes it) if it lists the same shards."""
    if shard_set.index.is_file():
        return Index(shard_set.index, shard_set.root, remedy)
    other = Index(shard_set.shared, shard_set.root, remedy) if shard_set.shared.is_file() else None
    return other if other is not None and other.names == shard_set.names else None


def _now(shard_set: ShardSet, shard: dict[str, Any]) -> tuple[int | None, int | str]:
    """(size, time stamp or tag) of a shard now."""
    if shard_set.is_remote():
        return stat(shard_set.url(shard["name"]))
    found = os.stat(shard_set.url(shard["name"]))
    return found.st_size, found.st_mtime_ns
