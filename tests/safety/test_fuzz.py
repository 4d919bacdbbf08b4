"""Readers of files from elsewhere on bytes that hypothesis and a mutator make: a valid value, or an error of ours that names the file;
never another exception, never a long wait, never a write outside. A failure prints its example and how to run it again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from launch import hosts
from launch.job import LaunchError
from tests.support.images import write_shards
from tests.support.journals import lines
from trainer.analysis.history import history
from trainer.checkpoint import directory
from trainer.config.errors import TrilevelError
from trainer.config.load import load
from trainer.data.errors import DataError
from trainer.data.shards.class_names import read_classes
from trainer.data.shards.index import Index, build_index
from trainer.data.shards.label_file import label_table
from trainer.data.shards.reader import Reader

SECONDS = 20.0  # for one example, on a busy machine
SEED = 20261121  # printed by pytest with the parameters of a failing test


class Case:
    """A reader: `good` is a valid file, `name` its place in the folder, `read` reads it there."""

    def __init__(
        self, name: str, good: bytes, read: Callable[[Path], Any], errors: tuple[type[Exception], ...], named: bool = True
    ):
        self.name, self.good, self.read, self.errors, self.named = name, good, read, errors, named


def _index(path: Path) -> None:
    index = Index(path)
    for data in Reader(index).read(np.arange(len(index))):
        assert isinstance(data, memoryview | DataError)


def _config(path: Path) -> None:
    load(path).resolved()


def _state(path: Path) -> None:
    directory.verify(path.parent)


def _cases(folder: Path) -> dict[str, Case]:
    pattern = write_shards(folder / "made", [3])
    index = build_index(pattern, progress=False)
    config = b"name: x\nmodel: {name: deit_tiny_patch16_224, classes: 4}\ndata: {train: a.tar, validation: b.tar}\noptim: {lr: 1.0e-3}\n"
    state = {"format": 2, "state": {"step": 1}, "files": {}}
    state["seal"] = directory._seal(state)
    journal = "".join(json.dumps(line) + "\n" for line in lines()).encode()
    ours = (TrilevelError,)
    return {
        "index": Case("train.index", index.path.read_bytes(), _index, ours),
        "tar": Case(
            "train-0000.tar", Path(index.source(0).url).read_bytes(), lambda p: build_index(str(p), progress=False), ours
        ),
        "labels": Case("labels.txt", b"a/1.png cat\na/2.png dog\n", lambda p: label_table(p, ["a/1", "a/2"]), ours),
        "classes": Case("classes.txt", b"cat\ndog\n", lambda p: read_classes(p.read_bytes(), str(p)), ours),
        "config": Case("c.yaml", config, _config, ours),
        "journal": Case("journal.jsonl", journal, lambda p: history(p.parent), ours),
        "state.json": Case("state.json", json.dumps(state).encode(), _state, ours, named=False),  # it names the checkpoint
        "hosts": Case(
            "hosts", b"node1 slots=8\nme@node2 slots=8\n", lambda p: hosts.read(p.read_text("latin-1"), str(p)), (LaunchError,)
        ),
    }


def mutated(good: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """Each change: at a place, drop some bytes and put others there."""
    data = bytearray(good)
    for place, dropped, put in changes:
        at = place % (len(data) + 1)
        data[at : at + dropped] = put
    return bytes(data)


WORDS = [
    b"\n",
    b"\0",
    b"\xff\xfe",
    b"[",
    b"{",
    b"*a",
    b"&a ",
    b"<<: ",
    b"!!int ",
    b"1e400",
    b"-1",
    b"9" * 30,
    b"null",
    b"NaN",
    b"../",
    b"\xe2\x80\xa8",
]
CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 64), st.one_of(st.binary(max_size=24), st.sampled_from(WORDS))),
    min_size=1,
    max_size=6,
)
BYTES = st.one_of(CHANGES, st.binary(max_size=300))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["index", "tar", "labels", "classes", "config", "journal", "state.json", "hosts"])
def test_a_reader_returns_a_value_or_names_the_file(name: str, tmp_path: Path) -> None:
    case = _cases(tmp_path)[name]
    folder = tmp_path / "run" / "read"
    folder.mkdir(parents=True)
    path = folder / case.name
    path.write_bytes(case.good)
    if name == "index":
        (folder / "train-0000.tar").write_bytes((tmp_path / "made" / "train-0000.tar").read_bytes())
    case.read(path)  # the good one is read
    outside = sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(folder))

    @seed(SEED)
    @settings(
        max_examples=400, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(BYTES)
    def check(found: bytes | list[tuple[int, int, bytes]]) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(found if isinstance(found, bytes) else mutated(case.good, found))
        began = time.monotonic()
        try:
            case.read(path)
        except case.errors as error:
            assert not case.named or case.name in str(error) or str(folder) in str(error), str(error)
            assert len(str(error)) < 5000
        assert time.monotonic() - began < SECONDS

    check()
    assert sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(folder)) == outside
