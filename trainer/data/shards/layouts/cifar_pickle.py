"""Reads a batch of CIFAR's python version without running what a pickle can run: numpy's arrays are rebuilt by stand-ins that only keep
shape and bytes, and every other name in the file is refused."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np


class _Array:
    """In place of numpy's array: its shape, data type and bytes."""

    shape: tuple[int, ...] = ()
    kind: Any = None
    data = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, fortran, self.data = state
        if fortran:
            raise pickle.UnpicklingError("an array in Fortran's order")


class _Type:
    """In place of numpy's data type: its name, e.g. u1."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        pass


def _array(*_: Any) -> _Array:
    return _Array()


def _latin1(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes with pickle's protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of CIFAR does")
        return found


def read_batch(data: bytes) -> dict[str, Any]:
    """The mapping in a pickle, keys as text; arrays of bytes as (rows, columns) uint8. Raises ValueError for anything else."""
    try:
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        return {_text(key): _plain(value) for key, value in found.items()}
    except Exception as error:  # a damaged pickle raises arbitrary exceptions
        raise ValueError(f"not a batch of CIFAR's python version: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        if not isinstance(value.kind, _Type) or value.kind.name not in ("u1", "|u1") or len(value.shape) != 2:
            raise ValueError("an array that is not of bytes, rows by columns")
        return np.frombuffer(value.data, dtype=np.uint8).reshape(value.shape)
    if isinstance(value, list):
        return [_text(one) for one in value]
    return value


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
