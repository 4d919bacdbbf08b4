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
from typing import NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from trainer.data.patience import DataError
from trainer.data.remote import listed, refuse, scheme
from trainer.data.tar import IMAGES, Member, members

_SAMPLES, _SAMPLE = 16, 4096  # blocks hashed by the fast fingerprint
_WHOLE = 1 << 20  # shards up to this size are always hashed whole
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members


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
        raise DataError(
            f"shard {path}: key {key!r} has {len(found)} images among its members {sorted(group)}; one is needed (a key ends at "
            "the first dot of a file name, and its members lie side by side: tar --sort=name)"
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


@contextmanager
def bar(title: str, total: int, unit: str, show: bool = True) -> Iterator[Progress]:
    """A progress bar over `total` things; `progress.advance(progress.task_ids[0])` per thing done."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as progress:
        progress.add_task(title, total=total)
        yield progress
