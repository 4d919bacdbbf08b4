"""Read an npz file that may come from others: the memory that it asks for is checked before it is taken."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

HEADER = 4096  # bytes that suffice for the header of one array; numpy writes 128


def read_npz(path: Path, most: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """{name: array} of all arrays, or of those of `names` that the file has.

    most: bytes of these arrays with their headers, uncompressed: 1 MB of zeros that deflate has compressed can hold 1 GiB.
    Raises OSError, and ValueError for everything else that is wrong with the file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in file.infolist()}
            entries = {name: entry for name, entry in entries.items() if names is None or name in names}
            size = sum(entry.file_size for entry in entries.values())
            if size > most:
                raise ValueError(f"its arrays have {size} bytes, must be <= {most}")
            return {name: _array(file, entry) for name, entry in entries.items()}
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile, zlib, struct, numpy: each has its own
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _array(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """One array. numpy allocates what the header asks for before it reads, so the header is compared with the bytes that follow it."""
    with file.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename}: version {version} of the npy format; must be 1.0 or 2.0")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        there = entry.file_size - stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != there:
        raise ValueError(f"{entry.filename}: {there} bytes do not fit {dtype} of shape {shape}")
    with file.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
