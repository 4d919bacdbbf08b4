"""Requests to each kind of store: the size of a shard, its bytes from an offset on, a listing of names.

http(s), gs and hf are read by `requests`, S3 by boto3. Credentials: see `sessions`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from trainer.data.errors import Changed, DataError
from trainer.data.remote.retry import TransientError, check_response
from trainer.data.remote.sessions import TIMEOUT, google, google_server, hub_server, s3, web
from trainer.data.remote.url import scheme

_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.*))?")


class RemoteStat(NamedTuple):
    """A server's metadata of a shard. bytes: None = unknown; tag: changes with the content, "" = none."""

    bytes: int | None
    tag: str


class Reply(NamedTuple):
    """An open body. begin: offset of its first byte in the shard; read(n): up to n bytes, b"" at the end."""

    begin: int
    tag: str
    read: Callable[[int], bytes]


def split(url: str) -> tuple[str, str]:
    """(bucket or data set with its scheme, path in it). Raises DataError for an hf:// URL of another form."""
    if scheme(url) == "hf":
        if not (found := _HUB.fullmatch(url)):
            raise DataError(f"shards {url!r}: invalid hf:// URL; use hf://datasets/ORG/NAME[@REVISION]/PATH")
        return url.removesuffix(found[3]).rstrip("/") if found[3] else url.rstrip("/"), found[3] or ""
    kind, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{kind}://{bucket}", key


def stat_of(url: str) -> RemoteStat:
    """Size and tag of a shard, by one request."""
    if scheme(url) == "s3":
        base, key = split(url)
        head = s3().head_object(Bucket=base.removeprefix("s3://"), Key=key)
        return RemoteStat(_bytes(url, head.get("ContentLength")), head.get("ETag", ""))
    client, address, auth = _web_client(url)
    headers = {"Accept-Encoding": "identity"}
    with client.head(address, timeout=TIMEOUT, allow_redirects=True, headers=headers, auth=auth) as reply:
        for hop in reply.history:  # the Hub sends the size with its redirect to a signed URL, which may refuse HEAD
            if "X-Linked-Size" in hop.headers:
                return RemoteStat(_bytes(url, hop.headers["X-Linked-Size"]), hop.headers.get("X-Linked-Etag", ""))
        if reply.status_code in (405, 501):  # HEAD not supported
            return RemoteStat(None, "")
        check_response(url, reply)
        return RemoteStat(_bytes(url, reply.headers.get("Content-Length")), _tag(reply))


@contextmanager
def opened(url: str, at: int, tag: str) -> Iterator[Reply]:
    """The body from byte `at` on; from an earlier byte if the server ignores ranges. tag: of the part already read, "" = none.
    Raises Changed if the shard has another tag now."""
    if scheme(url) == "s3":
        base, key = split(url)
        asked = ({"Range": f"bytes={at}-"} if at else {}) | ({"IfMatch": tag} if tag else {})
        try:
            reply = s3().get_object(Bucket=base.removeprefix("s3://"), Key=key, **asked)
        except Exception as error:
            code: Any = getattr(error, "response", None) or {}
            if code.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
                raise _changed(url) from None
            raise
        with closing(reply["Body"]) as body:
            yield Reply(_begin(url, at, reply.get("ContentRange")), reply.get("ETag", ""), body.read)
        return
    client, address, auth = _web_client(url)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={at}-"} if at else {})
    if at and tag.startswith('"'):  # If-Range needs a strong tag
        headers["If-Range"] = tag
    with client.get(address, stream=True, timeout=TIMEOUT, headers=headers, auth=auth) as reply:
        check_response(url, reply)
        if (encoding := reply.headers.get("Content-Encoding", "identity")) != "identity":
            raise DataError(
                f"shard {url}: the server sends Content-Encoding {encoding!r}; configure it to serve the file unencoded"
            )
        found = _tag(reply)
        if tag and found and tag != found:
            raise _changed(url)
        begin = _begin(url, at, reply.headers.get("Content-Range")) if reply.status_code == 206 else 0
        yield Reply(begin, found, partial(reply.raw.read, decode_content=False))


def pages(url: str, prefix: str, deep: bool) -> Iterator[list[str]]:
    """Paths below the bucket or data set of `url` that begin with `prefix`, in pages; deep: include subfolders."""
    base, kind = split(url)[0], scheme(url)
    folder = prefix.rpartition("/")[0]
    if kind == "s3":
        options = {} if deep else {"Delimiter": "/"}
        found = s3().get_paginator("list_objects_v2").paginate(Bucket=base.removeprefix("s3://"), Prefix=prefix, **options)
        for page in found:
            yield [item["Key"] for item in page.get("Contents", ())]
    elif kind == "gs":
        token: str | None = ""
        while token is not None:
            asked = {"prefix": prefix, "fields": "items/name,nextPageToken", "pageToken": token} | (
                {} if deep else {"delimiter": "/"}
            )
            address = f"{google_server()}/storage/v1/b/{quote(base.removeprefix('gs://'), safe='')}/o"
            with google().get(address, params=asked, timeout=TIMEOUT) as reply:
                check_response(url, reply)
                page = reply.json()
            yield [item["name"] for item in page.get("items", ())]
            token = page.get("nextPageToken")
    else:
        from huggingface_hub import HfApi

        repo, revision = _hub(url)
        api = HfApi(endpoint=hub_server())
        entries = iter(api.list_repo_tree(repo, folder or None, recursive=deep, revision=revision, repo_type="dataset"))
        while some := list(islice(entries, 1000)):
            yield [entry.path for entry in some if entry.path.startswith(prefix)]


def _web_client(url: str) -> tuple[Any, str, Any]:
    """(session, address, auth) of a shard that is read by plain HTTP requests."""
    kind = scheme(url)
    if kind == "gs":
        base, key = split(url)
        return google(), f"{google_server()}/{base.removeprefix('gs://')}/{quote(key)}", None
    if kind == "hf":
        from huggingface_hub import get_token, hf_hub_url

        repo, revision = _hub(url)
        address = hf_hub_url(repo, split(url)[1], repo_type="dataset", revision=revision, endpoint=hub_server())
        return web(), address, partial(_bearer, get_token())
    return web(), url, None


def _bearer(token: str | None, request: Any) -> Any:
    """The `auth` of a request: `requests` drops the token on a redirect to another host."""
    if token:
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def _hub(url: str) -> tuple[str, str | None]:
    """(ORG/NAME, revision) of an hf:// URL."""
    found = _HUB.fullmatch(url)
    assert found is not None
    return found[1], unquote(found[2]) if found[2] else None


def _tag(reply: Any) -> str:
    return reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""


def _changed(url: str) -> Changed:
    return Changed(f"shard {url} was replaced on its server while it was read; start again")


def _begin(url: str, at: int, content_range: str | None) -> int:
    """Offset of the first byte of a partial body. Raises TransientError if it lies after the requested one."""
    if content_range is None and at == 0:
        return 0
    found = re.match(r"bytes (\d{1,19})-", content_range or "")
    if not found or int(found[1]) > at:
        raise TransientError(f"requested bytes from {at} on, got Content-Range {content_range!r}")
    return int(found[1])


def _bytes(url: str, length: Any) -> int | None:
    """A size that a server sent. Raises DataError if it is not a number."""
    if length is None or length == "":
        return None
    if not re.fullmatch(r"\d{1,18}", str(length)):
        raise DataError(f"shard {url}: the server sent the size {str(length)[:30]!r}, not a number of bytes; check the server")
    return int(length)
