"""An npz file from elsewhere takes no more memory than the reader allows."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.checkpoint import save_load
from trainer.provenance import kept_lists
from trainer.storage.npz import read_npz

MIB = 1 << 20


def member(shape: tuple[int, ...], data: bytes, descr: str = "|u1") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


def archive(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def peak(call: Any, match: str) -> int:
    """Bytes that a call allocates until it is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(12.0).reshape(3, 4),
        "b": np.array(5),
        "c": np.asfortranarray(np.eye(3)),
        "d": np.array(["x", "yy"]),
    }
    np.savez(tmp_path / "a.npz", **arrays)  # pyright: ignore[reportArgumentType]
    found = read_npz(tmp_path / "a.npz", MIB)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], array) and found[name].dtype == array.dtype
    assert read_npz(tmp_path / "a.npz", 4096, ("b", "z")).keys() == {"b"}


@pytest.mark.parametrize("reader", ["kept list", "checkpoint"])
def test_a_bomb_is_refused_before_it_is_unpacked(reader: str, tmp_path: Path) -> None:
    """8 MiB of zeros in 8 kB. Before, a list of 1 MB took 1.6 GiB."""
    name = {"kept list": "kept/abc.npz", "checkpoint": "step/examples.npz"}[reader]
    path = archive(tmp_path / name, {"keep": member((8 * MIB,), bytes(8 * MIB))})
    assert path.stat().st_size < MIB
    call = {
        "kept list": lambda: kept_lists.read(tmp_path, "abc", 100),
        "checkpoint": lambda: save_load.arrays_of(tmp_path / "step"),
    }[reader]
    assert peak(call, "8388736 bytes, must be <= ") < MIB


@pytest.mark.parametrize(
    ("shape", "descr"), [((1 << 50,), "|u1"), ((-8, -1), "|u1"), ((8,), "<f8"), ((1 << 62, 1 << 62), "|u1")]
)
def test_a_header_that_does_not_fit_its_bytes_is_refused(shape: tuple[int, ...], descr: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", {"a": member(shape, bytes(8), descr)})
    assert peak(lambda: read_npz(path, MIB), "a.npy: 8 bytes do not fit") < MIB


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 99, member((1,), b"x", "|O")])
def test_everything_else_that_is_wrong_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_npz(archive(tmp_path / "a.npz", {"a": content}), MIB)
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(ValueError, match="BadZipFile"):
        read_npz(tmp_path / "b.npz", MIB)
