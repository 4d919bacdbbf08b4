"""From a shard pattern (path, glob, braces, URL) to the shards it names."""

from __future__ import annotations

import glob
import os
import re

from webdataset.shardlists import expand_urls

from trainer.data.errors import DataError
from trainer.data.remote.client import listed
from trainer.data.remote.url import refuse, scheme


def expand(pattern: str) -> tuple[str, str, list[str]]:
    """(root, stem, names): the directory or URL above the pattern's first wildcard, the literal start of the file names, the
    shards relative to root, sorted. A directory (s3: a URL ending with "/") stands for all its tars. Web servers are not
    asked here. Raises DataError: a URL of another kind or with a password, no match, a named file missing."""
    kind = scheme(pattern)
    if kind:
        refuse(pattern)
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
