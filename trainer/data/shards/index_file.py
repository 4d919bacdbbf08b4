"""The file format of an index: a memory-mapped safetensors file of arrays with a JSON header, validated when it is opened.

`safetensors.numpy.load_file("train.index")` gives offset, length, label, key_end and keys. Indexes are copied with data sets and are
not trusted: dtypes come from a table here, never from the file, counts must add up, images must lie inside their shards, and a hash
over header and arrays must match. Written to a temporary file and renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.errors import DataError
from trainer.storage.disk import atomic_write

VERSION = "trilevel-index-2"
ARRAYS = {  # dtype in safetensors and in numpy; the widest first, so that all are aligned
    "offset": ("I64", "<i8"),
    "key_end": ("I64", "<i8"),
    "length": ("U32", "<u4"),
    "label": ("I32", "<i4"),
    "keys": ("U8", "|u1"),
}
_ABOUT = {"labels": str, "packing": str, "classes": list, "shards": list}
_SHARD = {"name": str, "examples": int, "bytes": int, "time": int, "fast": str, "whole": str, "tag": str}
_HASH = re.compile(r"[0-9a-f]{32}")
_LONGEST_HEADER = 100 << 20  # bytes, as in the safetensors library
_LARGEST = 1 << 62  # bytes of a shard, so that sums of offsets stay in int64


class _Damaged(Exception):
    """What is wrong with the file."""


def read(path: Path, remedy: str) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """(header, arrays by name, hash of both). The arrays are memory-mapped. Raises DataError that ends with `remedy`."""
    try:
        raw = np.memmap(path, np.uint8, "r")
        if raw[:16].tobytes() == b"trilevel-index-1":
            raise DataError(f"index {path}: made by an earlier version; {remedy}")
        about, seal, arrays = _parse(raw)
        if _seal(about, arrays) != seal:
            raise _Damaged("hash mismatch")
        header = _object(about)
        _check_header(header)
        _check_arrays(header, arrays)
    except OSError as error:
        raise DataError(f"index {path}: cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError, _Damaged) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"index {path}: damaged: {error}; {remedy}") from error
    return header, arrays, seal


def _object(text: str | bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise _Damaged("the header is not a JSON object")
    return found


def _parse(raw: np.ndarray) -> tuple[str, str, dict[str, np.ndarray]]:
    """(header text, hash, arrays) in safetensors' layout: length, JSON, the arrays without gaps."""
    length = int.from_bytes(raw[:8].tobytes(), "little")
    base = 8 + length
    if base > len(raw) or length > _LONGEST_HEADER or length % 8:
        raise _Damaged("not an index, or truncated")
    tensors = _object(raw[8:base].tobytes())
    metadata = tensors.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != VERSION:
        raise _Damaged(f"not an index of this version ({VERSION})")
    about, seal = metadata.get("about"), metadata.get("seal")
    if not isinstance(about, str) or not isinstance(seal, str) or list(tensors) != list(ARRAYS):
        raise _Damaged(f"its arrays must be {', '.join(ARRAYS)}")
    arrays, end = {}, base
    for name, (word, dtype) in ARRAYS.items():
        begin, shape = end, tensors[name].get("shape") if isinstance(tensors[name], dict) else None
        if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 0 <= shape[0] <= len(raw):
            raise _Damaged(f"array {name!r} has shape {shape!r:.80}")
        end = begin + shape[0] * np.dtype(dtype).itemsize
        if tensors[name] != {"dtype": word, "shape": shape, "data_offsets": [begin - base, end - base]} or end > len(raw):
            raise _Damaged(f"array {name!r} is not {word} at bytes {begin} to {end} of {len(raw)}")
        arrays[name] = np.asarray(raw[begin:end]).view(dtype)
    if end != len(raw):
        raise _Damaged(f"{len(raw)} bytes, expected {end}")
    return about, seal, arrays


def _check_header(header: dict[str, Any]) -> None:
    if header.keys() != _ABOUT.keys() or any(type(header[key]) is not kind for key, kind in _ABOUT.items()):
        raise _Damaged(f"the header's keys must be {', '.join(_ABOUT)}")
    if not all(type(name) is str for name in header["classes"]) or len(set(header["classes"])) < len(header["classes"]):
        raise _Damaged("class names are not unique")
    for shard in header["shards"]:
        if type(shard) is not dict or shard.keys() != _SHARD.keys() or any(type(shard[k]) is not t for k, t in _SHARD.items()):
            raise _Damaged(f"a shard's keys must be {', '.join(_SHARD)}")
        if not (_HASH.fullmatch(shard["whole"]) and _HASH.fullmatch(shard["fast"])):  # `whole` becomes a file name in the cache
            raise _Damaged(f"shard {shard['name']!r:.80}: a hash must be 32 hexadecimal digits")
        if not (0 <= shard["examples"] < _LARGEST and 0 <= shard["bytes"] < _LARGEST):
            raise _Damaged(f"shard {shard['name']!r:.80}: {shard['examples']} examples in {shard['bytes']} bytes")
    names = [shard["name"] for shard in header["shards"]]
    if len(set(names)) < len(names):
        raise _Damaged("two shards have the same name")


def _check_arrays(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    number = sum(shard["examples"] for shard in header["shards"])
    if not number or any(len(arrays[name]) != number for name in ("offset", "length", "label", "key_end")):
        raise _Damaged(f"the shards have {number} examples, the arrays {[len(a) for a in arrays.values()]}")
    first = 0
    for shard in header["shards"]:
        part = slice(first, first := first + shard["examples"])
        offset = arrays["offset"][part]
        if len(offset) and not (offset.min() >= 0 and offset.max() <= shard["bytes"]):
            raise _Damaged(f"an image outside shard {shard['name']!r:.80}")
        if len(offset) and (offset[1:] < offset[:-1]).any():  # the reader takes neighbours together
            raise _Damaged(f"images of shard {shard['name']!r:.80} are not in the order of the file")
        if len(offset) and (offset + arrays["length"][part]).max() > shard["bytes"]:
            raise _Damaged(f"an image reaches beyond the end of shard {shard['name']!r:.80}")
    ends = arrays["key_end"]
    if ends[0] < 0 or ends[-1] != len(arrays["keys"]) or not (ends[1:] >= ends[:-1]).all():
        raise _Damaged("key_end does not rise to the length of keys")
    if not (arrays["label"].min() >= 0 and arrays["label"].max() < len(header["classes"])):
        raise _Damaged(f"a label outside the {len(header['classes'])} classes")


def _seal(about: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name in ARRAYS:
        digest.update(arrays[name].data)
    return digest.hexdigest()


def fingerprint(shards: list[dict[str, Any]], labels: np.ndarray) -> str:
    """Identifies the data of a run: hash of the shards' names, of all their bytes and of the labels."""
    digest = hashlib.blake2b(json.dumps([[s["name"], s["whole"]] for s in shards]).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(labels, "<i4").data)
    return digest.hexdigest()


def write(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write the index. Raises DataError if the file cannot be written."""
    arrays = {name: np.ascontiguousarray(arrays[name], dtype) for name, (_, dtype) in ARRAYS.items()}
    about = json.dumps(header)
    tensors: dict[str, Any] = {"__metadata__": {"format": VERSION, "about": about, "seal": _seal(about, arrays)}}
    end = 0
    for name, (word, _) in ARRAYS.items():
        begin, end = end, end + arrays[name].nbytes
        tensors[name] = {"dtype": word, "shape": list(arrays[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in ARRAYS:
                file.write(arrays[name].data)
    except OSError as error:
        raise DataError(
            f"index {path}: cannot be written: {error.strerror}; use another folder, by --index DIR (data.index)"
        ) from error
