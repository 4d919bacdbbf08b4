"""Journals of finished runs, compressed, in a folder that is committed: a study continues on another machine and its page is made again.

What names a machine or a person is left out: host names, absolute paths, tracking settings, lines about the load of hosts.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.job import LaunchError

FOLDER = "docs/results/study"
LEFT_OUT = frozenset({"system", "ranks", "message"})  # kinds of lines about hosts and users, which no table reads
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@|(?<=\?)\S*")


def path_of(folder: str | Path, study: str, arm: str, seed: int) -> Path:
    return Path(folder) / study / f"{arm}-seed{seed}.jsonl.xz"


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, plain or compressed; unreadable ones are left out. Raises OSError where there is no file."""
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (lzma.LZMAError, EOFError) as error:
        raise LaunchError(f"{path}: not a whole .xz file ({error}); remove it, or restore it from the repository") from error
    for row in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):  # the last line of a killed attempt, or a damaged one
            line = json.loads(row)
            if isinstance(line, dict):
                yield line


def keep(journal: Path, to: Path) -> Path:
    """Write the journal of a run, neutral and compressed, to `to`."""
    found = [line for line in lines(journal) if line.get("kind") not in LEFT_OUT]
    hosts = {
        str(host) for line in found if line.get("kind") == "start" for host in (line.get("host"), *_list(line.get("hosts")))
    }
    rows = "".join(json.dumps(neutral(line, hosts), separators=(",", ":")) + "\n" for line in found)
    to.parent.mkdir(parents=True, exist_ok=True)
    half = to.with_name(f".{to.name}.{os.getpid()}")
    half.write_bytes(lzma.compress(rows.encode(), preset=9))
    half.replace(to)
    return to


def neutral(line: dict[str, Any], hosts: set[str]) -> dict[str, Any]:
    """A line without host names, absolute paths, credentials and tracking settings; long lists of left-over ids as their number."""
    kept = dict(line)
    if kept.get("kind") == "start":
        kept.pop("host", None)
        kept["hosts"] = [f"host{i}" for i in range(len(_list(kept.get("hosts"))))]
        config = dict(kept.get("config") or {})
        config["tracking"] = {"to": (config.get("tracking") or {}).get("to")}
        kept["config"] = config
    if isinstance(kept.get("leftover"), dict):
        kept["leftover"] = {"count": kept["leftover"].get("count")}
    return {key: _neutral(value, hosts) for key, value in kept.items()}


def _neutral(value: Any, hosts: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _neutral(item, hosts) for key, item in value.items()}
    if isinstance(value, list):
        return [_neutral(item, hosts) for item in value]
    if isinstance(value, str):
        value = "host" if value in hosts else CREDENTIALS.sub("", value)
        return re.sub(r"(?<![\w/:.])~?/(?:[^\s/]+/)*([^\s/]*)", r"\1", value)  # of an absolute path its last part
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
