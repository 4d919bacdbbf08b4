"""Plain webdataset tars: which shards a pattern names, what lies where in them, whether they changed.

A shard is an uncompressed tar whose members of one sample lie side by side and share a key (webdataset's rule: the path up
to the first dot of the file name). Only headers and labels are read here; images stay where they are.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from trainer.data.patience import DataError
from trainer.data.remote import listed, refuse, scheme

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "gif", "tif", "tiff"})
_BLOCK = 512
_SAMPLES, _SAMPLE = 16, 4096  # blocks hashed by the fast fingerprint
_WHOLE = 1 << 20  # shards up to this size are always hashed whole
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """A file in a tar: name, and where its bytes are."""

    name: str
    offset: int
    length: int


class Sample(NamedTuple):
    """One example of a shard: its key, its image, its other members by extension (lower case)."""

    key: str
    image: Member
    others: dict[str, Member]


def expand(pattern: str, allow_pipe: bool = False) -> tuple[str, str, list[str]]:
    """(root, stem, names): the directory or URL above the pattern's first wildcard, the literal start of the file names, the
    shards relative to root, sorted. A directory (s3: a URL ending with "/") stands for all its tars. Web servers are not
    asked here. Raises DataError: a URL of another kind or with a password, no match, a named file missing."""
    kind = scheme(pattern)
    if kind:
        refuse(pattern, allow_pipe)
        return _expand_url(kind, pattern)
    if os.path.isdir(pattern):
        pattern = os.path.join(pattern, "*.tar")
    literal = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    if literal == pattern:
        literal = re.sub(r"\.tar$", "", pattern)
    root, stem = os.path.split(literal)
    paths: list[str] = []
    for path in expand_urls(pattern):
        found = sorted(glob.glob(path)) if re.search(r"[*?\[]", path) else [path]
        if not found:
            raise DataError(f"shards {pattern!r}: no file matches {path!r}; is the path right, were the shards packed?")
        paths += found
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        some = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"shards {pattern!r}: {missing[0]}{some} is missing; put it back or change the pattern")
    names = sorted({os.path.relpath(p, root or ".") for p in paths})
    if len(names) != len(paths):
        raise DataError(f"shards {pattern!r}: a shard is named twice")
    return root or ".", re.sub(r"[-_.]?\d*$", "", stem) or "shards", names


def _expand_url(kind: str, pattern: str) -> tuple[str, str, list[str]]:
    urls: list[str] = []
    for url in expand_urls(pattern):
        globbed = kind == "s3" and (re.search(r"[*?\[]", url) or url.endswith("/") or url.count("/") == 2)
        found = listed(url) if globbed else [url]
        if not found:
            raise DataError(f"shards {pattern!r}: nothing in the bucket matches {url!r}; is the name right?")
        urls += found
    if len(set(urls)) != len(urls):
        raise DataError(f"shards {pattern!r}: a shard is named twice")
    if kind == "pipe":
        return "", "pipe", sorted(urls)
    literal = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    root, _, stem = re.sub(r"\.tar$", "", literal).rpartition("/")
    return root, re.sub(r"[-_.]?\d*$", "", stem) or "shards", sorted(url.removeprefix(root + "/") for url in urls)


def open_pipe(url: str) -> BinaryIO:
    """The output of a `pipe:` command, as webdataset opens it; a failure of the command is an error at the end."""
    return gopen(url)  # pyright: ignore[reportReturnType]


def members(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order; bytes start .. stop of the file hold the tar.

    Reads headers only (about 5 us each). Understands ustar, GNU long names and pax paths. Raises DataError on a truncated,
    damaged or compressed tar.
    """
    with open(path, "rb") as file:
        descriptor = file.fileno()
        stop = os.fstat(descriptor).st_size if stop is None else stop
        at, name, pax_size = start, None, None
        while True:
            header = os.pread(descriptor, _BLOCK, at)
            if len(header) < _BLOCK or at + _BLOCK > stop:
                raise DataError(f"shard {path}: truncated, it ends at byte {stop} without an end mark; copy or pack it again")
            if not any(header):
                return
            length, kind = _check(path, header, at), header[156:157]
            if pax_size is not None and kind not in b"xgLK":
                length = pax_size
            offset = at + _BLOCK
            if offset + length > stop:
                raise DataError(
                    f"shard {path}: truncated inside {_text(header[:100])!r}, which ends at byte {offset + length} of {stop}; "
                    "copy or pack it again"
                )
            at = offset + -(-length // _BLOCK) * _BLOCK
            if kind == b"L":
                name = _text(os.pread(descriptor, length, offset))
            elif kind == b"x":
                pax = _pax(os.pread(descriptor, length, offset))
                name, pax_size = pax.get("path", name), int(pax["size"]) if "size" in pax else None
            elif kind not in b"gK":
                if kind in b"0\0":
                    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
                    short = _text(header[:100])
                    yield Member(name or (f"{prefix}/{short}" if prefix else short), offset, length)
                name, pax_size = None, None


def _check(path: str | Path, header: bytes, at: int) -> int:
    """Length of a member, its header's checksum held against its bytes."""
    try:
        stored = int(_text(header[148:156]).strip() or "x", 8)
        if stored != sum(header[:148]) + 256 + sum(header[156:]):
            raise ValueError
        if header[124] & 0x80:  # a number too long for octal digits
            return int.from_bytes(header[125:136], "big")
        return int(_text(header[124:136]).strip() or "0", 8)
    except ValueError:
        packed = _COMPRESSED.get(header[:2]) if at == 0 else None
        reason = (
            f"it is {packed} compressed; examples are read by their place, so unpack it" if packed else "copy or pack it again"
        )
        raise DataError(f"shard {path}: no tar header at byte {at}; {reason}") from None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    records, at = {}, 0
    while at < len(data):
        length = int(data[at : data.index(b" ", at)])
        key, _, value = data[at : at + length - 1].split(b" ", 1)[1].partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


def samples(path: str | Path) -> Iterator[Sample]:
    """The examples of a shard, in order. Raises DataError: see `members`; a sample without an image or with two."""
    key, group = None, {}
    for member in members(path):
        base, extension = base_plus_ext(member.name)
        if base is None or extension is None or _META.match(member.name):
            continue
        if base != key:
            if key is not None:
                yield _sample(path, key, group)
            key, group = base, {}
        if extension.lower() in group:
            raise DataError(f"shard {path}: key {key!r} has two members .{extension}; webdataset refuses that too")
        group[extension.lower()] = member
    if key is not None:
        yield _sample(path, key, group)


def _sample(path: str | Path, key: str, group: dict[str, Member]) -> Sample:
    found = [e for e in group if e in IMAGES] or [e for e in group if e.rsplit(".", 1)[-1] in IMAGES]
    if len(found) != 1:
        raise DataError(f"shard {path}: key {key!r} has {len(found)} images among its members {sorted(group)}; one is needed")
    return Sample(key, group[found[0]], {e: m for e, m in group.items() if e != found[0]})


def read(path: str | Path, member: Member) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), member.length, member.offset)


def fingerprint(path: str | Path, whole: bool = False) -> str:
    """Hash of a shard: of all its bytes (`whole`, or up to 1 MiB), else of its size and 16 blocks spread over it."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if whole or size <= _WHOLE:
            while block := file.read(1 << 22):
                digest.update(block)
        else:
            digest.update(str(size).encode())
            for i in range(_SAMPLES):
                digest.update(os.pread(file.fileno(), _SAMPLE, i * (size - _SAMPLE) // (_SAMPLES - 1)))
    return digest.hexdigest()


@contextmanager
def bar(title: str, total: int, unit: str, show: bool = True) -> Iterator[Progress]:
    """A progress bar over `total` things; `progress.advance(progress.task_ids[0])` per thing done."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as progress:
        progress.add_task(title, total=total)
        yield progress
