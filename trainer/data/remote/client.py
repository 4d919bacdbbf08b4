"""Shards that are not files of this machine: http(s)://, s3:// and (where allowed) pipe:. Their bytes as one stream that goes on
after a cut connection; what is there, of which size.

Credentials come from the environment only: netrc and proxies as `requests` reads them, AWS_* (also AWS_ENDPOINT_URL) as boto3
does; without AWS credentials public buckets are read unsigned. Light to import: the process that fetches ahead is made of this.
"""

from __future__ import annotations

import fnmatch
import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, BinaryIO, NamedTuple

from trainer.data.errors import DataError
from trainer.data.remote.retry import TransientError, backoff_or_raise, check_response, with_retries
from trainer.data.remote.url import refuse, scheme

_CHUNK = 1 << 18
_PROGRESS = 1 << 20  # bytes that count as progress
_SLOW = 60.0  # seconds without progress after which a connection is given up
_TIMEOUT = (10.0, 30.0)  # to connect, to the next byte


class RemoteStat(NamedTuple):
    """What a server says of a shard. bytes: None = it doesn't say; tag: changes with the content, "" = none."""

    bytes: int | None
    tag: str


def listed(url: str) -> list[str]:
    """The s3:// URLs a pattern with *, ? or [..] names, or all .tar under a URL that ends with "/"; sorted."""
    bucket, key = _bucket(url)
    wanted = key + "*.tar" if key.endswith("/") or not key else key
    prefix = re.split(r"[*?\[]", wanted, maxsplit=1)[0]
    pages = with_retries(url, lambda: list(_s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)))
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    depth = wanted.count("/")  # as in a shell, a wildcard stays inside its folder
    return sorted(f"s3://{bucket}/{k}" for k in keys if k.count("/") == depth and fnmatch.fnmatchcase(k, wanted))


def stat(url: str) -> RemoteStat:
    """Size and tag of a shard: one request. Raises DataError where it isn't there. (None, "") for a pipe."""
    kind = scheme(url)
    if kind == "":
        return RemoteStat(_stat(url).st_size, "")
    if kind == "pipe":
        return RemoteStat(None, "")

    def ask() -> RemoteStat:
        if kind == "s3":
            bucket, key = _bucket(url)
            head = _s3().head_object(Bucket=bucket, Key=key)
            return RemoteStat(head["ContentLength"], head.get("ETag", ""))
        with _web().head(url, timeout=_TIMEOUT, allow_redirects=True, headers={"Accept-Encoding": "identity"}) as reply:
            if reply.status_code in (405, 501):  # no HEAD here
                return RemoteStat(None, "")
            check_response(url, reply)
            length = reply.headers.get("Content-Length")
            return RemoteStat(
                int(length) if length else None, reply.headers.get("ETag", "") or reply.headers.get("Last-Modified", "")
            )

    return with_retries(url, ask)


def stream(url: str, size: int | None = None) -> Iterator[bytes]:
    """All bytes of a shard, in pieces. A cut or stalled connection is taken up again where it stopped, with backoff; after
    10 attempts without progress DataError. size: bytes expected, so that an early end is noticed (None: as the server says)."""
    size = stat(url).bytes if size is None else size
    at, failures = 0, 0
    while True:
        started, mark = time.monotonic(), at
        try:
            with closing(_opened(url, at)) as pieces:
                for piece in pieces:
                    at += len(piece)
                    if size is not None and at > size:
                        raise DataError(f"shard {url} changed: it has more than the {size} bytes expected; index it again")
                    yield piece
                    if at - mark >= _PROGRESS:
                        started, mark, failures = time.monotonic(), at, 0
                    elif time.monotonic() - started > _SLOW:
                        raise TransientError(f"less than {_PROGRESS} bytes in {_SLOW:.0f} s")
            if size is None or at == size:
                return
            raise TransientError(f"the connection ended after {at} of {size} bytes")
        except Exception as error:
            if scheme(url) == "pipe":  # a command can't be taken up in the middle
                raise error if isinstance(error, DataError) else DataError(f"shard {url}: {error}") from error
            failures += 1
            backoff_or_raise(url, error, failures)


def _opened(url: str, at: int) -> Generator[bytes, None, None]:
    """The bytes from `at` on, once."""
    kind = scheme(url)
    if kind == "":
        with open(url, "rb") as file:
            file.seek(at)
            while piece := file.read(1 << 22):
                yield piece
    elif kind == "pipe":
        with closing(open_pipe(url)) as file:
            while piece := file.read(_CHUNK):
                yield piece
    elif kind == "s3":
        bucket, key = _bucket(url)
        with closing(_s3().get_object(Bucket=bucket, Key=key, Range=f"bytes={at}-")["Body"]) as body:
            while piece := body.read(_CHUNK):
                yield piece
    else:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={at}-"} if at else {})
        with _web().get(url, stream=True, timeout=_TIMEOUT, headers=headers) as reply:
            check_response(url, reply)
            skip = at if reply.status_code == 200 else 0  # a server without ranges begins again
            for piece in reply.iter_content(_CHUNK):
                if skip < len(piece):
                    yield piece[skip:]
                skip = max(0, skip - len(piece))


def open_pipe(url: str) -> BinaryIO:
    """The output of a `pipe:` command, as webdataset opens it; a failure of the command is an error at the end."""
    refuse(url)  # however the name came here: patterns are checked before, an index or a cache only names shards
    from webdataset.gopen import gopen  # imports torch, which the fetching process does without

    return gopen(url)  # pyright: ignore[reportReturnType]


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"shard {path}: {error.strerror}") from error


def _bucket(url: str) -> tuple[str, str]:
    bucket, _, key = url.split("://", 1)[1].partition("/")
    return bucket, key


_clients: dict[tuple[str, int], Any] = {}  # by kind and process: connections don't survive a fork


def _web() -> Any:
    import requests
    from requests.adapters import HTTPAdapter

    found = _clients.get(("http", os.getpid()))
    if found is None:
        found = requests.Session()
        for start in ("http://", "https://"):
            found.mount(start, HTTPAdapter(pool_connections=8, pool_maxsize=64))
        _clients["http", os.getpid()] = found
    return found


def _s3() -> Any:
    found = _clients.get(("s3", os.getpid()))
    if found is None:
        try:
            from boto3.session import Session
            from botocore import UNSIGNED
            from botocore.config import Config
        except ImportError:
            raise DataError("s3:// needs boto3: pip install 'trilevel[s3]'") from None
        session = Session()
        options: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
        settings = Config(
            connect_timeout=_TIMEOUT[0], read_timeout=_TIMEOUT[1], retries={"total_max_attempts": 1},
            max_pool_connections=64, **options,
        )  # fmt: skip
        found = _clients["s3", os.getpid()] = session.client("s3", config=settings)
    return found
