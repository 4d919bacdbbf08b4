"""The file of an index: a magic word, a JSON header of known length, then arrays at aligned places, to be memory-mapped.

It appears under its name by a rename, whole; its size is in the header, so a copy that was cut off is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.errors import DataError

_MAGIC = b"trilevel-index-1"
_ALIGN = 64


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header, arrays by name); the arrays are read from the disk where they are touched. Raises DataError."""
    with open(path, "rb") as file:
        magic, length = file.read(len(_MAGIC)), int.from_bytes(file.read(8), "little")
        if magic != _MAGIC:
            raise DataError(f"index {path}: not an index of this version; run `trilevel index` on its shards again")
        text = file.read(length)
    header: dict[str, Any] = json.loads(text) if len(text) == length else {"size": -1}
    base = -(-(len(_MAGIC) + 8 + length) // _ALIGN) * _ALIGN
    if path.stat().st_size != base + header["size"]:
        raise DataError(f"index {path}: truncated; run `trilevel index` on its shards again")
    arrays = {
        name: np.asarray(np.memmap(path, dtype, "r", base + at, (count,))) if count else np.empty(0, dtype)
        for name, (at, dtype, count) in header["arrays"].items()
    }
    return header, arrays


def write(path: Path, about: dict[str, Any], shards: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> None:
    """Write an index: `about` and `shards` into its header, with a fingerprint of the shards' bytes and the labels.
    Raises DataError where there is no room or no right to."""
    places, at = {}, 0
    for name, array in arrays.items():
        places[name] = (at, array.dtype.str, len(array))
        at += -(-array.nbytes // _ALIGN) * _ALIGN
    digest = hashlib.blake2b(json.dumps([[s["name"], s["whole"]] for s in shards]).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(arrays["label"]).tobytes())
    header = about | {"fingerprint": digest.hexdigest(), "shards": shards, "arrays": places, "size": at}
    text = json.dumps(header).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            head = _MAGIC + len(text).to_bytes(8, "little") + text
            file.write(head + b"\0" * (-len(head) % _ALIGN))
            for array in arrays.values():
                file.write(array.tobytes() + b"\0" * (-array.nbytes % _ALIGN))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise DataError(
            f"index {path}: can't be written: {error.strerror}; name another folder with --index DIR (data.index)"
        ) from error
