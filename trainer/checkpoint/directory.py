"""A folder of checkpoints: write one completely or not at all, find the newest usable one, delete old ones.

`step-00001234/` has files and `state.json`, which lists the length and hash of each of them and its own hash. It is written under
a temporary name, synced, renamed; then the file `latest`, the name of the checkpoint to resume from, is replaced; only then is
anything deleted. A usable checkpoint is never overwritten: another one of the same step becomes `step-00001234.2`. So a crash at
any point leaves the previous checkpoint or the new one, and later damage on disk is detected (tests/checkpoint/test_power_loss.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.errors import TrilevelError
from trainer.storage.disk import Disk

FORMAT = 2  # format 1 has lengths of files, no hashes
ABOUT, LATEST = "state.json", "latest"
TEMPORARY = ".writing-"
NAME = re.compile(r"step-([0-9]+)(?:\.([0-9]+))?")


class Damaged(TrilevelError, ValueError):
    """A checkpoint that differs from what was written; the message names the difference."""


class Newest(NamedTuple):
    """The checkpoint to resume from, None if nothing was ever saved; and why damaged ones are not used."""

    path: Path | None
    damaged: list[str]


def write(
    folder: Path,
    step: int,
    files: Mapping[str, Iterable[Any]],
    about: dict[str, Any],
    same: Callable[[dict[str, Any]], bool],
    disk: Disk,
) -> Path:
    """Write a checkpoint and point `latest` at it.

    folder, step: of the checkpoint.
    files: {name: pieces of its content}.
    about: more fields of `state.json`.
    same: whether an existing `state.json` describes this very checkpoint; then only `latest` is replaced.
    disk: where to write.
    OSError (a full disk) leaves the previous checkpoint and `latest` unchanged, and no partial files.
    """
    for name in disk.names(folder):
        if name.startswith(TEMPORARY):  # left by a save that a crash interrupted
            disk.remove(folder / name)
    name, there = _place(folder, step, same, disk)
    temporary = folder / (TEMPORARY + name)
    try:
        if not there:
            disk.make_folder(temporary)
            written = {file: disk.write(temporary / file, pieces) for file, pieces in files.items()}
            disk.write(temporary / ABOUT, [_sealed({"format": FORMAT, **about, "files": written})])
            disk.sync(temporary)
            disk.rename(temporary, folder / name)
            disk.sync(folder)
        disk.write(folder / (TEMPORARY + LATEST), [name.encode()])
        disk.rename(folder / (TEMPORARY + LATEST), folder / LATEST)
        disk.sync(folder)
    except OSError:
        for left in (temporary, folder / (TEMPORARY + LATEST)):
            _try_to_remove(left, disk)
        raise
    return folder / name


def newest(
    folder: Path, disk: Disk | None = None, check: Callable[[str, dict[str, Any]], None] = lambda name, about: None
) -> Newest:
    """The checkpoint that `latest` names; if it is damaged, or `latest` is missing, the newest intact one. Reads and verifies all files.

    check: raises Damaged for a name and the content of its `state.json` that the caller cannot use.
    Raises Damaged if there are checkpoints and all of them are damaged.
    """
    disk = disk or Disk()
    names = by_age(disk.names(folder))[::-1]
    with contextlib.suppress(OSError):  # a folder, or a link to itself
        if disk.size(folder / LATEST) > 0:
            pointed = disk.read(folder / LATEST).decode(errors="replace").strip()
            names.sort(key=lambda name: name != pointed)  # stable: the others stay newest first
    damaged = []
    for name in names:
        try:
            check(name, verify(folder / name, disk))
            return Newest(folder / name, damaged)
        except Damaged as reason:
            damaged.append(str(reason))
    if damaged:
        raise Damaged(
            f"all checkpoints in {folder} are damaged: {'; '.join(damaged)}. Restore one from a copy, or move the run directory "
            "away to start from scratch"
        )
    return Newest(None, [])


def verify(path: Path, disk: Disk | None = None, content: bool = True) -> dict[str, Any]:
    """The content of `state.json`, after checking the length of every file, and with `content` its hash. Raises Damaged."""
    disk = disk or Disk()
    try:
        about = json.loads(disk.read(path / ABOUT))
        if type(about["format"]) is not int:
            raise Damaged(f"{path.name}: {ABOUT} has format {about['format']!r:.40}")
        if about["format"] > FORMAT:
            return about  # written by a newer version
        if about["format"] > 1 and about["seal"] != _seal(about):
            raise Damaged(f"{path.name}: {ABOUT} was changed")
        files = about["files"] if about["format"] > 1 else {name: (size, None) for name, size in about["bytes"].items()}
        for file, (size, hashed) in files.items():
            if (there := disk.size(path / file)) != size:
                is_there = "is missing" if there < 0 else f"has {there} bytes"
                raise Damaged(f"{path.name}: {file} {is_there}, {size} were written")
            if content and hashed is not None and disk.content(path / file).hash != hashed:
                raise Damaged(f"{path.name}: the hash of {file} differs from the one written with it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{path.name}: {ABOUT} can't be read ({error})") from error
    return about


def prune(folder: Path, wanted: Collection[str], disk: Disk) -> None:
    """Delete the checkpoints that are not `wanted`; a crash leaves each of them intact or under a temporary name."""
    for name in by_age(disk.names(folder)):
        if name not in wanted:
            disk.rename(folder / name, folder / (TEMPORARY + "old-" + name))
            disk.remove(folder / (TEMPORARY + "old-" + name))


def by_age(names: Iterable[str]) -> list[str]:
    """The checkpoints among file names, by step, oldest first."""
    found = [(match, name) for name in names if (match := NAME.fullmatch(name))]
    return [name for match, name in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 1)))]


def step_of(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def _place(folder: Path, step: int, same: Callable[[dict[str, Any]], bool], disk: Disk) -> tuple[str, bool]:
    """A name for a checkpoint of `step`, and whether this very checkpoint exists under it."""
    taken = disk.names(folder)
    for again in count(1):
        name = f"step-{step:08d}" + (f".{again}" if again > 1 else "")
        if name not in taken:
            return name, False
        try:
            if same(verify(folder / name, disk)):
                return name, True
        except Damaged:
            pass  # deleted after the new one is written
    raise AssertionError


def _sealed(about: dict[str, Any]) -> bytes:
    plain = json.loads(json.dumps(about))  # as JSON reads it: keys are strings, tuples are lists
    return json.dumps({**plain, "seal": _seal(plain)}, indent=1).encode()


def _seal(about: dict[str, Any]) -> str:
    """Hash of `state.json` without the hash itself."""
    rest = {key: value for key, value in about.items() if key != "seal"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _try_to_remove(path: Path, disk: Disk) -> None:
    with contextlib.suppress(OSError):  # the next save tries again
        disk.remove(path)
