"""The samples of a webdataset tar, and fingerprints that show whether a shard changed.

A shard is an uncompressed tar in which the members of one sample are adjacent and share a key (webdataset's rule: the path up to
the first dot of the file name). Only tar headers are read here, no images.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from trainer.data.errors import DataError
from trainer.data.shards.tar import IMAGES, Member, members
from trainer.storage.text import listed

_SAMPLES, _SAMPLE = 16, 4096  # blocks hashed by the fast fingerprint
_WHOLE = 1 << 20  # shards up to this size are always hashed whole
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members


class Sample(NamedTuple):
    """One example of a shard: its key, its image, its other members by extension (lower case)."""

    key: str
    image: Member
    others: dict[str, Member]


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
            raise DataError(f"shard {path}: key {key!r} has two members .{extension}; remove one (webdataset rejects them too)")
        group[extension.lower()] = member
    if key is not None:
        yield _sample(path, key, group)


def _sample(path: str | Path, key: str, group: dict[str, Member]) -> Sample:
    found = [e for e in group if e in IMAGES] or [e for e in group if e.rsplit(".", 1)[-1] in IMAGES]
    if len(found) != 1:
        there = listed(f".{name}" for name in sorted(found or group))
        raise DataError(
            f"shard {path}: key {key!r} has {len(found)} images among its {len(group)} members ({there}), must have 1; a key ends at "
            "the first dot of a file name (img.0001.jpg has the key img), and its members must be adjacent (tar --sort=name)"
        )
    return Sample(key, group[found[0]], {e: m for e, m in group.items() if e != found[0]})


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
