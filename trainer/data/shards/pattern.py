"""Expands a shard pattern (path, glob, braces, URL) to the shards that match."""

from __future__ import annotations

import glob
import os
import re

from webdataset.shardlists import expand_urls

from trainer.data.errors import DataError
from trainer.data.remote.client import is_listed, listed
from trainer.data.remote.url import refuse, scheme

_MOST = 1_000_000  # shards of a pattern
_BRACES = re.compile(
    r"\{(?P<first>-?\d+)\.\.(?P<last>-?\d+)(?:\.\.-?(?P<step>\d{1,18}))?\}|\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\}|[{},]"
)


def expand(pattern: str) -> tuple[str, str, list[str]]:
    """(root, stem, names): the directory or URL above the pattern's first wildcard, the literal start of the file names, the
    shards relative to root, sorted. A directory (s3, gs, hf: a URL ending with "/") stands for all its tars. Sends no request to
    web servers. Raises DataError: an unsupported URL or one with a password, no match, a missing file."""
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
    for path in _expand_braces(pattern):
        found = sorted(glob.glob(path)) if re.search(r"[*?\[]", path) else [path]
        if not found:
            raise DataError(f"shards {pattern!r}: no file matches {path!r}; check the path, or pack the shards")
        paths += found
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        some = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"shards {pattern!r}: {missing[0]}{some} not found; restore or change the pattern")
    names = sorted({os.path.relpath(p, root or ".") for p in paths})
    if len(names) != len(paths):
        raise DataError(f"shards {pattern!r}: a shard matches twice; remove the overlap")
    return root or ".", re.sub(r"[-_.]?\d*$", "", stem) or "shards", names


def _expand_braces(pattern: str) -> list[str]:
    """webdataset's brace expansion. Raises DataError for unbalanced braces, and for more than 10^6 names before they are in memory."""
    if sum(_num_names(part) for part in pattern.split("::")) > _MOST:
        raise DataError(f"shards {pattern[:200]!r}: the braces expand to more than {_MOST} shards; check their ranges")
    try:
        return expand_urls(pattern)
    except ValueError as error:
        raise DataError(f"shards {pattern!r}: {error}; close every brace") from error


def _num_names(pattern: str) -> int:
    """An upper bound on the number of names that the braces of a pattern expand to."""
    before, last = [0], [1]  # per open brace: names of the alternatives before the last comma, and of the one after it
    for token in _BRACES.finditer(pattern):
        if token["first"]:
            digits = max(len(token["first"]), len(token["last"]))
            last[-1] *= (
                abs(int(token["last"]) - int(token["first"])) // (int(token["step"] or 1) or 1) + 1
                if digits < 20
                else _MOST + 1
            )
        elif token[0] == "{":
            before.append(0)
            last.append(1)
        elif len(last) > 1 and token[0] == ",":
            before[-1] += last[-1]
            last[-1] = 1
        elif len(last) > 1 and token[0] == "}":
            alternatives = before.pop() + last.pop()
            last[-1] *= alternatives
        elif ".." in token[0]:
            last[-1] *= 52  # {a..z}: at most all letters
    return last[0]


def _expand_url(kind: str, pattern: str) -> tuple[str, str, list[str]]:
    urls: list[str] = []
    for url in _expand_braces(pattern):
        found = listed(url) if is_listed(url) else [url]
        if not found:
            raise DataError(f"shards {pattern!r}: no object matches {url!r}; check the name")
        urls += found
    if len(set(urls)) != len(urls):
        raise DataError(f"shards {pattern!r}: a shard matches twice; remove the overlap")
    if kind == "pipe":
        return "", "pipe", sorted(urls)
    literal = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    root, _, stem = re.sub(r"\.tar$", "", literal).rpartition("/")
    return root, re.sub(r"[-_.]?\d*$", "", stem) or "shards", sorted(url.removeprefix(root + "/") for url in urls)
