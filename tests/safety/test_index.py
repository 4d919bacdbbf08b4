"""An index is read strictly: forged or damaged ones are refused by name, none leads to other bytes, labels or files."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.images import jpeg, write_shards
from trainer import __main__ as trilevel
from trainer.data.errors import DataError
from trainer.data.remote.cache import Cache
from trainer.data.shards import index_file
from trainer.data.shards.index import Index, build_index, open_index
from trainer.data.shards.reader import Reader

SIZES = [6, 6]
Header = dict[str, Any]
Arrays = dict[str, np.ndarray]


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    found = write_shards(tmp_path / "shards", SIZES)
    build_index(found, progress=False)
    return found


def path_of(pattern: str) -> Path:
    return Path(pattern).parent / "train.index"


def forge(
    path: Path, header: Callable[[Header], Any] = id, arrays: Callable[[Arrays], Any] = id, seal: str | None = None
) -> None:
    """Write the index again, changed, and sealed as an attacker would (or with `seal`)."""
    about, found, _ = index_file.read(path, "")
    changed = {name: np.array(array) for name, array in found.items()}
    arrays(changed)
    about = json.loads(json.dumps(about))
    header(about)
    text, tensors, end = json.dumps(about), {}, 0
    digest = seal or (index_file._seal(text, changed) if "label" in changed else "0" * 32)
    for name, array in changed.items():
        word = {"<i8": "I64", "<u4": "U32", "<i4": "I32", "|u1": "U8"}.get(array.dtype.str, array.dtype.str)
        tensors[name] = {"dtype": word, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    write_raw(path, tensors, {"about": text, "seal": digest, "format": index_file.VERSION}, changed)


def write_raw(path: Path, tensors: Any, metadata: Any, arrays: Arrays) -> None:
    text = json.dumps({"__metadata__": metadata, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values()))


def put(name: str, place: Any, value: Any) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays[name].__setitem__(place, value)


def shard(**settings: Any) -> Callable[[Header], Any]:
    return lambda header: header["shards"][0].update(settings)


def key(**settings: Any) -> Callable[[Header], Any]:
    return lambda header: header.update(settings)


ARRAYS: dict[str, Callable[[Arrays], Any]] = {
    "pointers for labels": lambda a: a.update(label=a["label"].astype("<i8").view("|V8")),
    "labels of another type": lambda a: a.update(label=a["label"].astype("<i8")),
    "images not in the order of the file": lambda a: put("offset", slice(0, 2), a["offset"][1::-1].copy())(a),
    "offset beyond the end": put("offset", 1, 1 << 40),
    "offset so large that its end is negative": put("offset", 1, (1 << 63) - 1),
    "offset negative": put("offset", 1, -5000),
    "length beyond the end": put("length", 1, (1 << 32) - 1),
    "last image of a shard one byte too long": put("length", 5, 1 << 20),
    "label negative": put("label", 1, -1),
    "label too large": put("label", 1, 10**9),
    "key ends beyond the keys": put("key_end", 1, 1 << 40),
    "key ends fall": put("key_end", 3, 0),
    "one label too few": lambda a: a.update(label=a["label"][:-1]),
    "a table of labels": lambda a: a.update(label=a["label"].reshape(-1, 1)),
    "no array of labels": lambda a: a.pop("label"),
    "one array more": lambda a: a.update(more=np.zeros(3, "<i8")),
}
HEADERS: dict[str, Callable[[Header], Any]] = {
    "one example less": shard(examples=5),
    "one example more": shard(examples=7),
    "examples negative": shard(examples=-3),
    "examples of 10^12": shard(examples=10**12),
    "examples a text": shard(examples="6"),
    "examples true": shard(examples=True),
    "bytes negative": shard(bytes=-1),
    "bytes beyond int64": shard(bytes=1 << 70),
    "whole a path": shard(whole="../../precious"),
    "whole of capitals": shard(whole="A" * 32),
    "whole with a line": shard(whole="a" * 32 + "\n"),
    "another shard": shard(name="../../../etc/passwd"),
    "a shard twice": lambda h: h["shards"][1].update(name=h["shards"][0]["name"]),
    "shard without hash": lambda h: h["shards"][0].pop("whole"),
    "shards a text": key(shards="x"),
    "a root of its own": key(root="/etc"),
    "classes numbers": key(classes=[0, 1, 2, 3]),
    "classes twice": key(classes=["a", "a", "b", "c"]),
    "too few classes": key(classes=["a"]),
    "labels missing": lambda h: h.pop("labels"),
}


@pytest.mark.parametrize("name", [*ARRAYS, *HEADERS])
def test_forged_indexes_are_refused(pattern: str, name: str) -> None:
    forge(path_of(pattern), HEADERS.get(name, id), ARRAYS.get(name, id))
    with pytest.raises(DataError, match=r"train.index|not in the index") as error:
        open_index(pattern)
    assert f"trilevel index '{pattern}'" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 64, b"\xff" * 64, b"\x08" + b"\0" * 7 + b"[1,2]   ", b"[" * 100_000])
def test_files_that_are_no_index(pattern: str, content: bytes) -> None:
    for text in (content, len(content).to_bytes(8, "little") + content):
        path_of(pattern).write_bytes(text)
        with pytest.raises(DataError, match=r"train.index: damaged"):
            open_index(pattern)


@pytest.mark.parametrize(
    "metadata", [None, 3, {}, {"about": "{}"}, {"about": "\ud800", "seal": "x", "format": index_file.VERSION}]
)
def test_headers_of_another_form(pattern: str, metadata: Any) -> None:
    write_raw(path_of(pattern), {}, metadata, {})
    with pytest.raises(DataError, match=r"train.index: damaged"):
        open_index(pattern)


def test_a_label_changed_after_indexing_is_noticed(pattern: str) -> None:
    was = open_index(pattern).fingerprint
    _, _, seal = index_file.read(path_of(pattern), "")
    forge(path_of(pattern), arrays=put("label", 1, 2), seal=seal)
    with pytest.raises(DataError, match="damaged: hash mismatch"):
        open_index(pattern, verify="full")
    assert trilevel.main(["verify", pattern]) == 2
    build_index(pattern, progress=False)
    forge(path_of(pattern), arrays=put("label", 1, 2))  # sealed anew: another data set, so resume and audit refuse it
    assert open_index(pattern).fingerprint != was


def test_every_bit_counts(pattern: str) -> None:
    whole, rng = path_of(pattern).read_bytes(), np.random.default_rng(0)
    for bit in rng.integers(0, 8 * len(whole), 300).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path_of(pattern).write_bytes(damaged)
        try:
            index = open_index(pattern)
        except DataError:
            continue
        pytest.fail(f"bit {bit}: {index}")
    for cut in (1, 7, 100, len(whole) // 2, len(whole) - 1):
        path_of(pattern).write_bytes(whole[:cut])
        with pytest.raises(DataError):
            open_index(pattern)


def test_images_are_read_from_the_folder_that_was_asked_for(pattern: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    index = build_index(pattern, progress=False, folder=str(tmp_path / "idx"))
    Path(pattern).parent.rename(elsewhere)
    shutil.copy(index.path, elsewhere / "train.index")
    moved = open_index(str(elsewhere / "train-*.tar"))
    assert [bytes(data) for data in Reader(moved).read(np.arange(12))] == [jpeg(i) for i in range(12)]  # pyright: ignore
    again = pickle.loads(pickle.dumps(moved))
    assert bytes(Reader(again).read(np.arange(1))[0]) == jpeg(0)  # pyright: ignore[reportArgumentType]


def test_no_file_is_deleted_or_overwritten_by_way_of_the_cache(pattern: str, tmp_path: Path) -> None:
    for name in ("precious.tar", "precious.part"):
        (tmp_path / name).write_text("thesis")
    for whole in (str(tmp_path / "precious"), "../../precious", "../precious"):
        forge(path_of(pattern), shard(whole=whole))
        with pytest.raises(DataError, match="hash must be 32 hexadecimal digits"):
            Reader(Index(path_of(pattern)), Cache(tmp_path / "a" / "cache", 1 << 30)).read(np.arange(12))
        build_index(pattern, progress=False)
    assert {p.read_text() for p in tmp_path.glob("precious.*")} == {"thesis"}


def test_an_index_replaced_under_a_running_job_is_noticed(pattern: str) -> None:
    sent = pickle.dumps(open_index(pattern))
    forge(path_of(pattern), arrays=put("label", 1, 2))
    with pytest.raises(DataError, match="changed while it was in use"):
        pickle.loads(sent)


def test_an_index_of_an_earlier_version_is_named_with_the_command(pattern: str) -> None:
    path_of(pattern).write_bytes(b"trilevel-index-1" + b"\0" * 100)
    with pytest.raises(DataError, match=r"made by an earlier version; run `trilevel index '.*' --labels 'key'`"):
        open_index(pattern, "key")


def test_safetensors_opens_it(pattern: str) -> None:
    arrays, index = load_file(path_of(pattern)), open_index(pattern)
    assert arrays["label"].tolist() == index.labels.tolist() and arrays["offset"].tolist() == index.offset.tolist()


def test_the_fingerprint_is_defined_as_ever(tmp_path: Path) -> None:
    """Checkpoints and journals hold it: it may not change between versions."""
    shards = [{"name": "a-0.tar", "whole": "0" * 32}, {"name": "a-1.tar", "whole": "f" * 32}]
    assert index_file.fingerprint(shards, np.arange(5, dtype=np.int32)) == "8a91ccb67e67bb822d2d69a2a5fb1a57"


def test_a_large_index_opens_fast(tmp_path: Path) -> None:
    """1.28 million examples, as ImageNet has them."""
    number = 1_281_000
    shards = [
        {
            "name": f"t-{i:04d}.tar",
            "examples": 1281,
            "bytes": 1 << 28,
            "time": 0,
            "fast": "0" * 32,
            "whole": "0" * 32,
            "tag": "",
        }
        for i in range(1000)
    ]
    arrays = {
        "offset": np.tile(np.arange(1281) * 100_000, 1000), "length": np.full(number, 90_000), "label": np.arange(number) % 1000,
        "key_end": np.arange(1, number + 1) * 20, "keys": np.zeros(20 * number, np.uint8),
    }  # fmt: skip
    header = {"labels": "cls", "packing": "", "classes": [f"n{i}" for i in range(1000)], "shards": shards}
    index_file.write(tmp_path / "t.index", header, arrays)
    Index(tmp_path / "t.index")
    started = time.process_time()
    Index(tmp_path / "t.index")
    assert time.process_time() - started < 2  # .1 s on an idle core
