"""A folder of checkpoints: one is put there whole or not at all, the newest usable one is found, the others go.

`step-00001234/` holds files and `state.json`, which names the length and hash of each of them and of itself. It is written under
a temporary name, synced, renamed; the file `latest`, which names the checkpoint to go on from, moves last, and only then is
anything removed. Nothing usable is ever overwritten: another checkpoint of the same step becomes `step-00001234.2`. So a crash at
any point leaves the previous checkpoint or the new one, and what a disk damaged later is noticed (tests/checkpoint/test_power_loss.py).
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

FORMAT = 2  # 1 knew the lengths of files, not their hashes
ABOUT, LATEST = "state.json", "latest"
TEMPORARY = ".writing-"
NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")


class Damaged(TrilevelError, ValueError):
    """A checkpoint that is not what was written; the text says in what."""


class Newest(NamedTuple):
    """The checkpoint to go on from, None where nothing was ever saved; and why newer ones are passed over."""

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
    """Write a checkpoint of `files` (name -> pieces) and `about`, and point `latest` at it. `same` tells from what lies there whether it
    is this very checkpoint: then only `latest` has to move.

    OSError (a full disk) leaves the previous checkpoint and `latest` as they were, and nothing half-written.
    """
    for name in disk.names(folder):
        if name.startswith(TEMPORARY):  # of a save that a crash ended
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


def newest(folder: Path, disk: Disk | None = None) -> Newest:
    """The checkpoint that `latest` names; where it is damaged, or `latest` is lost, the newest that is whole. All of it is read.

    Raises Damaged where there are checkpoints and none of them can be used.
    """
    disk = disk or Disk()
    names = by_age(disk.names(folder))[::-1]
    if disk.size(folder / LATEST) > 0:
        pointed = disk.read(folder / LATEST).decode(errors="replace").strip()
        names.sort(key=lambda name: name != pointed)  # stable: the others stay newest first
    damaged = []
    for name in names:
        try:
            verify(folder / name, disk)
            return Newest(folder / name, damaged)
        except Damaged as reason:
            damaged.append(str(reason))
    if damaged:
        raise Damaged(
            f"no checkpoint in {folder} can be used: {'; '.join(damaged)}. Bring one back from a copy, or move the run's directory "
            "away to start anew"
        )
    return Newest(None, [])


def verify(path: Path, disk: Disk | None = None, content: bool = True) -> dict[str, Any]:
    """What `state.json` says, after a look at every file of the checkpoint: its length, and with `content` its hash. Raises Damaged."""
    disk = disk or Disk()
    try:
        about = json.loads(disk.read(path / ABOUT))
        if about["format"] > FORMAT:
            return about  # not ours to judge
        if about["format"] > 1 and about["seal"] != _seal(about):
            raise Damaged(f"{path.name}: {ABOUT} was changed")
        files = about["files"] if about["format"] > 1 else {name: (size, None) for name, size in about["bytes"].items()}
        for file, (size, hashed) in files.items():
            if (there := disk.size(path / file)) != size:
                is_there = "is missing" if there < 0 else f"has {there} bytes"
                raise Damaged(f"{path.name}: {file} {is_there}, {size} were written")
            if content and hashed is not None and disk.content(path / file).hash != hashed:
                raise Damaged(f"{path.name}: {file} has another hash than what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{path.name}: {ABOUT} can't be read ({error})") from error
    return about


def prune(folder: Path, wanted: Collection[str], disk: Disk) -> None:
    """Remove the checkpoints that are not `wanted`, and what is damaged; a crash leaves each of them whole or recognisably not."""
    for name in by_age(disk.names(folder)):
        if name not in wanted:
            disk.rename(folder / name, folder / (TEMPORARY + "old-" + name))
            disk.remove(folder / (TEMPORARY + "old-" + name))


def by_age(names: Iterable[str]) -> list[str]:
    """The checkpoints among names of files, by step, the oldest first."""
    found = [(match, name) for name in names if (match := NAME.fullmatch(name))]
    return [name for match, name in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 1)))]


def step_of(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def _place(folder: Path, step: int, same: Callable[[dict[str, Any]], bool], disk: Disk) -> tuple[str, bool]:
    """A name for a checkpoint of `step`, and whether this very checkpoint has it already."""
    taken = disk.names(folder)
    for again in count(1):
        name = f"step-{step:08d}" + (f".{again}" if again > 1 else "")
        if name not in taken:
            return name, False
        try:
            if same(verify(folder / name, disk)):
                return name, True
        except Damaged:
            pass  # it goes when the new one is there
    raise AssertionError


def _sealed(about: dict[str, Any]) -> bytes:
    plain = json.loads(json.dumps(about))  # as it is read again: keys are texts, tuples are lists
    return json.dumps({**plain, "seal": _seal(plain)}, indent=1).encode()


def _seal(about: dict[str, Any]) -> str:
    """Hash of all that `state.json` says but for the hash itself."""
    rest = {key: value for key, value in about.items() if key != "seal"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _try_to_remove(path: Path, disk: Disk) -> None:
    with contextlib.suppress(OSError):  # the next save tries again
        disk.remove(path)
