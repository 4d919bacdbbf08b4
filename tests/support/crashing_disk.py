"""A disk in memory that can lose power: what `trainer.storage.disk.Disk` asks of the operating system,
and every state that a crash may leave.

The promises are POSIX's and no more. What was written to a file and not fsynced may be lost, torn, or zeros of the new length. What
happened to the names of a folder and was not fsynced may be lost name by name: each pending change of a folder lasts or not, whatever
the others do, but a rename is one change. fsync of a file does not cover its name.
"""

from __future__ import annotations

import copy
import errno
import itertools
import os
import random
import stat
from collections.abc import Iterator
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any


class File:
    def __init__(self) -> None:
        self.now, self.safe = b"", b""


class Folder:
    """now: names as a program sees them; safe: as they are on the disk; pending: what lies between, [(name removed, name set, node)]."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self.safe: dict[str, Any] = {}
        self.pending: list[tuple[str | None, str | None, Any]] = []

    def change(self, removed: str | None, added: str | None, node: Any) -> None:
        self.pending.append((removed, added, node))
        _apply(self.now, removed, added, node)


def _apply(names: dict[str, Any], removed: str | None, added: str | None, node: Any) -> None:
    if removed is not None:
        names.pop(removed, None)
    if added is not None:
        names[added] = node


class System:
    """The functions of `os` that Disk uses. `calls`: how many of those that change something were made; `stop`: the call at which
    `error` is raised in its place; after each, `after` is called, where a test takes a picture of the disk."""

    def __init__(self) -> None:
        self.root = Folder()
        self.calls, self.stop, self.error = 0, -1, OSError(errno.ENOSPC, "No space left on device")
        self.after = lambda: None
        self._open: dict[int, Any] = {}

    def _changing(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.stop:
            raise self.error

    def _find(self, path: Any) -> Any:
        node: Any = self.root
        for part in PurePath(path).parts[1:]:
            if not isinstance(node, Folder):
                raise NotADirectoryError(path)
            if part not in node.now:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            node = node.now[part]
        return node

    def mkdir(self, path: Any) -> None:
        self._changing()
        folder = self._find(PurePath(path).parent)
        if PurePath(path).name in folder.now:
            raise FileExistsError(path)
        folder.change(None, PurePath(path).name, Folder())
        self.after()

    def open(self, path: Any, flags: int, _mode: int) -> int:
        if flags & os.O_CREAT:
            self._changing()
            folder, name = self._find(PurePath(path).parent), PurePath(path).name
            if name in folder.now:
                folder.now[name].now = b""
            else:
                folder.change(None, name, File())
            self.after()
        handle = len(self._open)
        self._open[handle] = [self._find(path), 0]
        return handle

    def write(self, handle: int, data: Any) -> int:
        self._changing()
        taken = bytes(data[: max(1, len(data) // 2 + 1)])  # a system may take less than it is given
        self._open[handle][0].now += taken
        self.after()
        return len(taken)

    def fsync(self, handle: int) -> None:
        self._changing()
        node = self._open[handle][0]
        if isinstance(node, File):
            node.safe = node.now
        else:
            node.safe, node.pending = dict(node.now), []
        self.after()

    def close(self, handle: int) -> None:
        self._open[handle] = None

    def read(self, handle: int, size: int) -> bytes:
        node, at = self._open[handle]
        self._open[handle][1] = at + size
        return node.now[at : at + size]

    def replace(self, old: Any, new: Any) -> None:
        self._changing()
        folder, names = self._find(PurePath(old).parent), (PurePath(old).name, PurePath(new).name)
        assert PurePath(old).parent == PurePath(new).parent, "renames stay in a folder"
        node, there = self._find(old), folder.now.get(names[1])
        if isinstance(there, Folder) and there.now:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(new))
        folder.change(names[0], names[1], node)
        self.after()

    def unlink(self, path: Any) -> None:
        if isinstance(self._find(path), Folder):
            raise IsADirectoryError(path)
        self._changing()
        self._find(PurePath(path).parent).change(PurePath(path).name, None, None)
        self.after()

    def rmdir(self, path: Any) -> None:
        if self._find(path).now:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        self._changing()
        self._find(PurePath(path).parent).change(PurePath(path).name, None, None)
        self.after()

    def listdir(self, path: Any) -> list[str]:
        node = self._find(path)
        if isinstance(node, File):
            raise NotADirectoryError(path)
        return list(node.now)

    def stat(self, path: Any) -> Any:
        node = self._find(path)
        if isinstance(node, File):
            return SimpleNamespace(st_size=len(node.now), st_mode=stat.S_IFREG)
        return SimpleNamespace(st_size=4096, st_mode=stat.S_IFDIR)

    def crashed(self, limit: int, rng_keys: random.Random) -> Iterator[System]:
        """The disks that a crash at this moment may leave: all of them where they are at most `limit`, else that many drawn ones."""
        choices = [[*range(2 ** len(folder.pending))] for folder in _folders(self.root)]
        contents = [list(_after_crash(file)) for file in _files(self.root)]
        spaces: list[list[Any]] = [*choices, *contents]
        total = 1
        for space in spaces:
            total *= len(space)
        if total <= limit:
            picks: Any = itertools.product(*spaces)
        else:
            picks = ([rng_keys.choice(space) for space in spaces] for _ in range(limit))
        for pick in picks:
            yield self._left(pick)

    def _left(self, pick: Any) -> System:
        left = System()
        left.root = copy.deepcopy(self.root)  # the walk below meets the copies in the order of the originals
        folders, files = list(_folders(left.root)), list(_files(left.root))
        for folder, chosen in zip(folders, pick, strict=False):
            names = dict(folder.safe)
            for bit, change in enumerate(folder.pending):
                if chosen >> bit & 1:
                    _apply(names, *change)
            folder.now, folder.safe, folder.pending = names, dict(names), []
        for file, content in zip(files, pick[len(folders) :], strict=True):
            file.now = file.safe = content
        return left


def _after_crash(file: File) -> Iterator[bytes]:
    """What a crash may make of a file: as it was, as it should be, torn, or of the right length and empty."""
    yield file.safe
    if file.now != file.safe:
        yield from dict.fromkeys((file.now, file.now[: len(file.now) // 2], bytes(len(file.now)), b""))


def _nodes(root: Folder) -> Iterator[Any]:
    """Every node that is or may come to be reachable, each once."""
    seen: set[int] = set()
    todo: list[Any] = [root]
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, Folder):
            todo += [*node.now.values(), *node.safe.values(), *(change[2] for change in node.pending)]


def _folders(root: Folder) -> Iterator[Folder]:
    return (node for node in _nodes(root) if isinstance(node, Folder))


def _files(root: Folder) -> Iterator[File]:
    return (node for node in _nodes(root) if isinstance(node, File))
