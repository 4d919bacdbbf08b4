"""Remote shards: http(s)://, s3://, gs://, hf:// and (where allowed) pipe:. Their bytes as one stream that resumes after a broken
connection, their sizes, and lists of their names. Credentials: see `sessions`."""

from __future__ import annotations

import fnmatch
import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import BinaryIO

from trainer.data.errors import DataError
from trainer.data.remote import stores
from trainer.data.remote.deadline import in_thread, in_time
from trainer.data.remote.retry import Stalled, TransientError, backoff_or_raise, tries, with_retries
from trainer.data.remote.stores import RemoteStat
from trainer.data.remote.url import LISTED, refuse, scheme

_CHUNK = 1 << 18
_PROGRESS = 1 << 20  # bytes that count as progress
_SLOW = 60.0  # seconds of waiting without progress until a request is aborted
_MOST, _MOST_PAGES = 1_000_000, 2_000  # limits: shards of a pattern, pages of a listing


def is_listed(url: str) -> bool:
    """Whether a URL needs a listing of its bucket: it has *, ? or [..], ends with "/" or is the bucket alone."""
    if scheme(url) not in LISTED:
        return False
    key = stores.split(url)[1]
    return not key or key.endswith("/") or bool(re.search(r"[*?\[]", key))


def listed(url: str) -> list[str]:
    """The URLs that match a pattern with *, ? or [..], or all .tar under a URL that ends with "/"; sorted. Raises DataError if the
    listing has more than 10^6 entries."""
    base, key = stores.split(url)
    wanted = key + "*.tar" if key.endswith("/") or not key else key
    prefix = re.split(r"[*?\[]", wanted, maxsplit=1)[0]
    depth = wanted.count("/")  # as in a shell, a wildcard stays inside its folder
    keys = with_retries(url, lambda: _keys(url, prefix, deep=depth > prefix.count("/")))
    return sorted(f"{base}/{k}" for k in keys if k.count("/") == depth and fnmatch.fnmatchcase(k, wanted))


def _keys(url: str, prefix: str, deep: bool) -> list[str]:
    keys: list[str] = []
    read = 0
    with in_thread(lambda: (page for page in stores.pages(url, prefix, deep))) as get:
        while (page := get(_SLOW)) is not None:
            keys += page
            read += 1
            if len(keys) > _MOST or read > _MOST_PAGES:
                raise DataError(
                    f"shards {url!r}: the server's listing has more than {len(keys)} names on {read} pages; name the shards with "
                    "braces, as in train-{0000..1023}.tar"
                )
    return keys


def stat(url: str) -> RemoteStat:
    """Size and tag of a shard, by one request. Raises DataError if it does not exist. (None, "") for a pipe."""
    kind = scheme(url)
    if kind == "":
        return RemoteStat(_stat(url).st_size, "")
    if kind == "pipe":
        return RemoteStat(None, "")
    return with_retries(url, lambda: in_time(lambda: stores.stat_of(url), _SLOW))


def stream(url: str, size: int | None = None) -> Iterator[bytes]:
    """All bytes of a shard, in pieces. A broken or stalled connection is resumed at the same byte, with backoff; DataError after
    10 attempts without progress. size: expected bytes, to detect a truncated body (None: the server's Content-Length).
    Raises Changed if the shard was replaced during the download."""
    size = stat(url).bytes if size is None else size
    body, left = _Body(url), tries()
    limited = scheme(url) not in ("", "pipe")  # a command may take long before its first byte
    while True:
        mark, waited = body.at, 0.0
        try:
            with in_thread(body.pieces) as get:
                while True:
                    began = time.monotonic()
                    piece = get(_SLOW - waited if limited else None)
                    waited += time.monotonic() - began
                    if piece is None:
                        break
                    body.at += len(piece)
                    if size is not None and body.at > size:
                        raise DataError(f"shard {url} changed: it has more than the expected {size} bytes; index it again")
                    yield piece
                    if body.at - mark >= _PROGRESS:
                        mark, waited, left = body.at, 0.0, tries()
            if size is None or body.at == size:
                return
            raise TransientError(f"the connection ended after {body.at} of {size} bytes")
        except Exception as error:
            if scheme(url) == "pipe":  # a command cannot be resumed in the middle
                raise error if isinstance(error, DataError) else DataError(f"shard {url}: {error}") from error
            if isinstance(error, Stalled):
                error = Stalled(f"less than {_PROGRESS} bytes in {_SLOW:.0f} s")
            left = backoff_or_raise(url, error, left)


def read_all(url: str, most: int) -> bytes:
    """All bytes of a small file. Raises DataError if it has more than `most`."""
    found = bytearray()
    for piece in stream(url):
        found += piece
        if len(found) > most:
            raise DataError(f"{url} has more than {most} bytes; check that it is the right file")
    return bytes(found)


class _Body:
    """The bytes of a shard from `at` on; `tag`: identifies their version, "" = unknown."""

    def __init__(self, url: str) -> None:
        self.url, self.at, self.tag = url, 0, ""

    def pieces(self) -> Generator[bytes, None, None]:
        """The rest, by one request."""
        at, kind = self.at, scheme(self.url)  # the reader advances `at` while this generator prefetches
        if kind == "":
            with open(self.url, "rb") as file:
                file.seek(at)
                while piece := file.read(1 << 22):
                    yield piece
            return
        if kind == "pipe":
            with closing(open_pipe(self.url)) as file:
                while piece := file.read(_CHUNK):
                    yield piece
            return
        with stores.opened(self.url, at, self.tag if at else "") as reply:
            self.tag = self.tag if at and self.tag else reply.tag
            skip = at - reply.begin
            while piece := reply.read(_CHUNK):
                if skip < len(piece):
                    yield piece[skip:]
                skip = max(0, skip - len(piece))


def open_pipe(url: str) -> BinaryIO:
    """The output of a `pipe:` command, opened by webdataset's gopen; if the command fails, reading its end raises."""
    refuse(url)  # patterns are checked earlier, names from an index are not
    from webdataset.gopen import gopen  # here, because it imports torch and the fetch process runs without

    return gopen(url)  # pyright: ignore[reportReturnType]


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"shard {path}: {error.strerror}") from error
