"""Schemes of shard URLs: parse them, refuse those that are not supported."""

from __future__ import annotations

import re

from trainer.config.pipes import ALLOW_HINT, pipes_allowed
from trainer.data.errors import DataError

LISTED = ("s3", "gs", "hf")  # stores with a listing
_SCHEME = re.compile(r"^(?:(pipe):|([A-Za-z][A-Za-z0-9+.-]*)://)")


def scheme(name: str) -> str:
    """ "http", "https", "s3", "pipe" or another scheme of a URL; "" for a path."""
    found = _SCHEME.match(name)
    return (found[1] or found[2]).lower() if found else ""


def refuse(pattern: str) -> None:
    """Raise DataError for URLs of unsupported schemes, and for URLs that contain credentials."""
    kind = scheme(pattern)
    if kind == "pipe":
        if not pipes_allowed():
            command = pattern.removeprefix("pipe:")
            raise DataError(f"shards {pattern!r}: this would run {command!r} in a shell; if you trust it, use {ALLOW_HINT}")
        return
    if kind not in ("http", "https", *LISTED):
        raise DataError(
            f"shards {pattern!r}: unsupported scheme {kind}://; use a path, http(s)://, s3://, gs://, hf:// or pipe:"
        )
    host = pattern.split("://", 1)[1].split("/", 1)[0]
    if "@" in host:
        shown = pattern.replace(host, host.rpartition("@")[2])
        raise DataError(
            f"shards {shown!r}: the URL contains a user or password, which would end up in logs; remove it and give "
            "credentials in the environment (http: a netrc file, NETRC=FILE; s3: AWS_ACCESS_KEY_ID, ...; hf: HF_TOKEN)"
        )
    if kind not in LISTED and re.search(r"[*?\[#]", pattern):
        raise DataError(
            f"shards {pattern.split('?')[0]!r}: web servers have no listing, and queries (signed URLs) contain credentials; "
            "name the shards with braces, as in train-{0000..1023}.tar"
        )
