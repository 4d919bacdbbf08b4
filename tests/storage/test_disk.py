"""A file that is written in place of another: whole, or what was there before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from trainer.storage.disk import atomic_write


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "no folder" / "x"):
        raise AssertionError("the block must not run")


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the first sync a crash may leave an empty file under the name, without the last one the old file."""
    calls: list[str] = []

    def heard(name: str) -> None:
        true = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name if name != "fsync" else f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{arguments[0]}'))}")
            return true(*arguments)

        monkeypatch.setattr(os, name, call)

    heard("fsync")
    heard("replace")
    with atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert [call.rpartition(".")[0] if ".writing-" in call else call for call in calls] == [
        "fsync .writing-a",
        "replace",
        f"fsync {tmp_path.name}",
    ]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / ".writing-a.guessed").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "a"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "precious").read_bytes() == b"kept" and not (tmp_path / "a").exists()


def test_two_writers_with_one_process_id_each_write_a_whole_file(tmp_path: Path) -> None:
    """Containers on two nodes that share a folder: both trainers are process 1. One of them got half of the other's file."""
    path = tmp_path / "weights.safetensors"
    with atomic_write(path) as second:
        second.write(b"b" * 50)
        with atomic_write(path) as first:
            first.write(b"a" * 100)
        assert path.read_bytes() == b"a" * 100
        second.write(b"b" * 50)
    assert path.read_bytes() == b"b" * 100 and list(tmp_path.iterdir()) == [path]
