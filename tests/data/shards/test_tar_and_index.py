"""Tars are read as they are: any writer's, any labels; what is damaged or changed is refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset import WebDataset

from tests.support.images import jpeg, write_shards, write_tar
from trainer.__main__ import main
from trainer.data.errors import DataError
from trainer.data.shards import index as shard_index
from trainer.data.shards.index import Index, build_index, open_index
from trainer.data.shards.pattern import expand
from trainer.data.shards.reader import Reader
from trainer.data.shards.samples import fingerprint, samples
from trainer.data.shards.tar import members


def index_of(pattern: str, labels: str = "cls") -> Index:
    return build_index(pattern, labels, progress=False)


def test_members_are_where_tarfile_finds_them(tmp_path: Path) -> None:
    long = "deep/" * 30 + "n" * 90
    for number, style in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=style) as tar:
            for name, size in (("a.jpg", 700), ("dir/ünï.jpg", 0), (long[:100] + ".jpg", 512), ("z.cls", 1)):
                if style != tarfile.USTAR_FORMAT and len(name) > 90:
                    name = long + ".jpg"
                info = tarfile.TarInfo(name)
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        with tarfile.open(path) as tar:
            theirs = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isfile()]
        assert [tuple(m) for m in members(path)] == theirs


def test_index_agrees_with_webdataset(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [5, 1, 7])
    index = index_of(pattern)
    assert index.sizes.tolist() == [5, 1, 7] and len(index) == 13 and index.classes == ["0", "1", "2", "3"]
    urls = [str(tmp_path / n) for n in index.names]
    theirs = list(WebDataset(urls, shardshuffle=False, empty_check=False))
    ours = Reader(index).read(np.arange(13))
    for i, (sample, data) in enumerate(zip(theirs, ours, strict=True)):
        assert sample["__key__"] == index.key(i)
        assert sample["jpg"] == bytes(data)  # pyright: ignore[reportArgumentType]
        assert int(sample["cls"]) == index.labels[i]
    assert index.shard_of(np.array([0, 4, 5, 6, 12])).tolist() == [0, 0, 1, 2, 2]
    assert "train-0002.tar key 'img00006'" in index.where(6)


def test_index_costs_less_than_32_bytes_an_example(tmp_path: Path) -> None:
    index = index_of(write_shards(tmp_path, [200]))
    keys = sum(len(index.key(i)) for i in range(200))
    arrays = index.offset.nbytes + index.length.nbytes + index.labels.nbytes + index._key_end.nbytes
    assert arrays <= 32 * 200 and index._keys.nbytes == keys
    again = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 1000 and again.key(199) == index.key(199)


@pytest.mark.parametrize("labels", ["cls", "json:label", "json:name", "key", "file"])
def test_labels_of_foreign_shards(tmp_path: Path, labels: str) -> None:
    names = ["owl", "ant", "bee"]
    files: dict[str, bytes] = {}
    for i in range(6):
        name = names[i % 3]
        key = f"{name}/{i}" if i < 3 else f"{name}_{i}"
        files[f"{key}.JPEG"] = jpeg(i)
        if labels == "cls":
            files[f"{key}.cls"] = name.encode()
        files[f"{key}.json"] = json.dumps({"label": sorted(names).index(name), "name": name}).encode()
    write_tar(tmp_path / "a.tar", files)
    (tmp_path / "labels.txt").write_text(
        "".join(f"{names[i % 3]}_{i}.JPEG {names[i % 3]}\n{i}.JPEG {names[i % 3]}\n" for i in range(6))
    )
    index = index_of(str(tmp_path / "a.tar"), f"file:{tmp_path / 'labels.txt'}" if labels == "file" else labels)
    assert index.classes == (["0", "1", "2"] if labels == "json:label" else ["ant", "bee", "owl"])
    assert index.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert open_index(str(tmp_path / "a.tar"), index.label_source).fingerprint == index.fingerprint


def test_training_and_validation_share_classes_txt(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\nowl\n")
    write_tar(tmp_path / "val-0.tar", {"owl_1.jpg": jpeg(0)})
    assert index_of(str(tmp_path / "val-0.tar"), "key").labels.tolist() == [2]
    write_tar(tmp_path / "val-0.tar", {"yak_1.jpg": jpeg(0)})
    with pytest.raises(DataError, match=r"'yak' is not among the 3 classes"):
        index_of(str(tmp_path / "val-0.tar"), "key")


def test_patterns(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 1, 1])
    want = ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    for pattern in ("train-*.tar", "train-{0000..0002}.tar", "train-000[0-9].tar", "."):
        root, stem, names = expand(str(tmp_path / pattern))
        assert (root, names) == (str(tmp_path), want)
        assert stem == ("shards" if pattern == "." else "train")
    assert expand(str(tmp_path / "train-0001.tar"))[1:] == ("train", ["train-0001.tar"])
    with pytest.raises(DataError, match=r"train-0003.tar and 1 more not found"):
        expand(str(tmp_path / "train-{0000..0004}.tar"))
    with pytest.raises(DataError, match=r"no file matches"):
        expand(str(tmp_path / "none-*.tar"))


def damaged(data: bytes, how: str) -> bytes:
    if how == "cut in a member":
        return data[:1500]
    if how == "cut at a border":
        return data[: 512 + -(-int(data[124:135], 8) // 512) * 512]
    if how == "no end mark":
        return data.rstrip(b"\0") + b"\0" * (-len(data.rstrip(b"\0")) % 512)
    if how == "not a tar":
        return b"hello" * 500
    import gzip

    return gzip.compress(data)


@pytest.mark.parametrize("how", ["cut in a member", "cut at a border", "no end mark", "not a tar", "gzip"])
def test_damaged_tars_are_refused_by_name(tmp_path: Path, how: str) -> None:
    pattern = write_shards(tmp_path, [2, 2])
    path = tmp_path / "train-0001.tar"
    path.write_bytes(damaged(path.read_bytes(), how))
    reason = {"cut in a member": "truncated inside 'img00002", "not a tar": "no tar header", "gzip": "no tar header.*gzip"}
    with pytest.raises(DataError, match=rf"train-0001.tar: {reason.get(how, 'truncated: no end mark')}"):
        index_of(pattern)


def block(name: str, kind: bytes, data: bytes, size: bytes | None = None) -> bytes:
    """A member as raw bytes; `size`: its field of 12 bytes, whatever the truth."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    header[124:136] = header[124:136] if size is None else size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + b"\0" * (-len(data) % 512)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (block("p", b"x", b"hello"), "no tar header at byte 0"),
        (block("p", b"x", b"0 path=a.jpg\n"), "no tar header at byte 0"),  # would be read for ever
        (block("p", b"x", b"99 path=a.jpg\n"), "no tar header at byte 0"),
        (block("p", b"x", b"13 size=-999\n"), "no tar header at byte 1024"),
        (block("p", b"x", b"5011 size=" + b"9" * 5000 + b"\n"), "no tar header at byte 5632"),  # Python's int() refuses it too
        (block("p", b"L", b"", b"77777777777\0"), "truncated inside 'p'"),
        (block("b.jpg", b"0", b"", b"-7777777777\0"), "no tar header at byte 0"),  # would go backwards
        (block("b.jpg", b"0", b"", b"\xff" * 12), "no tar header at byte 0"),
        (block("b.jpg", b"1", b""), "'b.jpg' is a hard link.*--hard-dereference"),
        (block("b.jpg", b"2", b""), "'b.jpg' is a symbolic link"),
        (block("b.jpg", b"S", b""), "'b.jpg' is a sparse file.*without --sparse"),
        (block("p", b"x", b"28 GNU.sparse.name=d/b.jpeg\n"), "'d/b.jpeg' is a sparse file"),
        (block("b.jpg", b"0", b"") + bytes(1024), "another tar follows its end mark"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, first: bytes, reason: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(first + block("a.jpg", b"0", jpeg(0)) + block("a.cls", b"0", b"0") + bytes(1024))
    with pytest.raises(DataError, match=rf"a.tar: {reason}"):
        list(members(path))


def test_links_and_folders_that_are_no_images_are_left_alone(tmp_path: Path) -> None:
    other = block("README", b"2", b"") + block("folder/", b"5", b"") + block("old/", b"\0", b"") + block("c.jpg", b"7", b"1234")
    (tmp_path / "a.tar").write_bytes(other + bytes(512))
    assert [tuple(m) for m in members(tmp_path / "a.tar") if m.length] == [("c.jpg", 4 * 512, 4)]


@pytest.mark.parametrize(
    ("labels", "member", "reason"),
    [
        ("cls", b"", "empty label"),
        ("cls", b"-1", "label '-1'"),
        ("cls", b"3.0", "invalid label '3.0'"),
        ("cls", b"99999999999", "class number 99999999999 is too large"),
        ("json:l", b'{"l": 3.0}', "field 'l' of its .json is 3.0"),
        ("json:l", b'{"l": null}', "is None"),
        ("json:l", b"[3]", "no field 'l'"),
        ("json:l", b"{", "no field 'l'"),
    ],
)
def test_labels_that_mean_nothing_are_refused(tmp_path: Path, labels: str, member: bytes, reason: str) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), f"a.{labels[:4].rstrip(':')}": member})
    with pytest.raises(DataError, match=reason):
        index_of(str(tmp_path / "a.tar"), labels)


def test_shards_without_an_example_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-0.tar", {})
    with pytest.raises(DataError, match="no examples found"):
        index_of(str(tmp_path / "a-*.tar"))
    write_tar(tmp_path / "a-1.tar", {"a.jpg": jpeg(0), "a.cls": b"0"})
    assert index_of(str(tmp_path / "a-*.tar")).sizes.tolist() == [0, 1]


def test_samples_that_make_no_example(tmp_path: Path) -> None:
    image = jpeg(0)
    path = write_tar(
        tmp_path / "a.tar", {"__meta__/x.jpg": image, "a.jpg": image, "a.cls": b"0", "README": b"", "._a.jpg": b""}
    )
    assert [s.key for s in samples(path)] == ["a"]
    for files, reason in (
        ({"a.txt": b""}, "0 images"),
        ({"a.jpg": image, "a.png": image}, "2 images"),
        ({"a.jpg": image, "a.JPG": image}, "two members"),
    ):
        with pytest.raises(DataError, match=reason):
            list(samples(write_tar(tmp_path / "b.tar", files)))
    write_tar(tmp_path / "c-0.tar", {"a.jpg": image, "a.cls": b"0", "b.jpg": image})
    with pytest.raises(DataError, match=r"c-0.tar: key 'b' has no .cls"):
        index_of(str(tmp_path / "c-0.tar"))
    write_tar(tmp_path / "c-0.tar", {"a.jpg": image, "a.cls": b"0", "b.jpg": image, "b.cls": b"cat"})
    with pytest.raises(DataError, match=r"both numbers .* and names"):
        index_of(str(tmp_path / "c-0.tar"))


def test_changed_shards_are_refused_by_name(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [3, 3, 3])
    with pytest.raises(DataError, match=r"index .* not found; .*trilevel index"):
        open_index(pattern)
    index_of(pattern)
    assert len(open_index(pattern, verify="full")) == 9
    with pytest.raises(DataError, match=r"labels from 'cls', data.labels='key'"):
        open_index(pattern, "key")
    path = tmp_path / "train-0001.tar"
    original = path.read_bytes()

    flipped = bytearray(original)
    flipped[600] ^= 1
    for how, data in (("bytes", original + b"\0" * 512), ("since it was indexed", bytes(flipped))):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"train-0001.tar changed.*{how}"):
            open_index(pattern)
    path.unlink()
    with pytest.raises(DataError, match=r"train-0001.tar is in the index .* missing"):
        open_index(pattern)
    path.write_bytes(original)
    (tmp_path / "train-0003.tar").write_bytes(original)
    with pytest.raises(DataError, match=r"train-0003.tar is not in the index"):
        open_index(pattern)
    (tmp_path / "train-0003.tar").unlink()
    assert len(open_index(pattern)) == 9
    index = tmp_path / "train.index"
    for length in (-100, 40):
        index.write_bytes(index.read_bytes()[:length])
        with pytest.raises(DataError, match=r"train.index: damaged"):
            open_index(pattern)


def test_patterns_that_begin_alike_have_indexes_of_their_own(tmp_path: Path) -> None:
    whole = write_shards(tmp_path, [2] * 4)
    first, last, one = (str(tmp_path / f"train-{part}.tar") for part in ("{0000..0001}", "000[23]", "0003"))
    built = {pattern: index_of(pattern) for pattern in (first, last, one, whole, str(tmp_path))}
    assert len({index.path for index in built.values()}) == 5
    for folder in (None, str(tmp_path / "indexes")):
        for pattern, index in built.items():
            build_index(pattern, progress=False, folder=folder)
            assert open_index(pattern, folder=folder).names == index.names
        assert [len(open_index(pattern, folder=folder)) for pattern in built] == [4, 4, 2, 8, 8]


def test_one_index_serves_all_patterns_of_the_same_shards(tmp_path: Path) -> None:
    index = index_of(write_shards(tmp_path, [2] * 4))
    assert index.path.name == "train.index"
    for pattern in ("train-{0000..0003}.tar", "train-000*.tar"):
        assert open_index(str(tmp_path / pattern)).path == index.path, "that of `train-*.tar`: the same shards"
    with pytest.raises(DataError, match=r"index .*train-\w+.index not found; run `trilevel index"):
        open_index(str(tmp_path / "train-{0000..0002}.tar"))


def test_fast_fingerprint_of_a_long_shard(tmp_path: Path) -> None:
    """Sampled, so it misses some changes; the time stamp makes `open_index` read such a shard whole."""
    folder = tmp_path / "long"
    folder.mkdir()
    noise = np.random.default_rng(0).bytes(3 << 20)
    path = write_tar(folder / "x-0.tar", {"a.jpg": noise, "a.cls": b"0"})
    index_of(str(path))
    assert len(open_index(str(path), verify="full")) == 1
    fast, whole = fingerprint(path), fingerprint(path, whole=True)
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1  # between two of the sampled blocks
    stamp = path.stat()
    path.write_bytes(data)
    assert fingerprint(path) == fast and fingerprint(path, whole=True) != whole
    with pytest.raises(DataError, match="changed since"):
        open_index(str(path))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    open_index(str(path))
    with pytest.raises(DataError, match="changed since"):
        open_index(str(path), verify="full")


def test_touched_shards_are_read_whole_up_to_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two whose time stamp is new, the one that fits is read whole; the other by its sample, which misses this change."""
    paths = [
        write_tar(tmp_path / f"x-{n}.tar", {"a.jpg": np.random.default_rng(n).bytes(3 << 20), "a.cls": b"0"}) for n in range(2)
    ]
    pattern = str(tmp_path / "x-*.tar")
    index_of(pattern)
    data = bytearray(paths[1].read_bytes())
    data[100_000] ^= 1  # between two of the sampled blocks
    paths[1].write_bytes(data)
    os.utime(paths[0], ns=(1, 1))
    for budget, read_whole in ((len(data) - 1, False), (len(data), False), (2 * len(data), True)):
        monkeypatch.setattr(shard_index, "_BUDGET", budget)
        if read_whole:
            with pytest.raises(DataError, match="changed since"):
                open_index(pattern)
        else:
            open_index(pattern)


def test_shards_sorted_by_class_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{name}_{i}.jpg": jpeg(0) for name in ("ant", "bee", "cat", "dog") for i in range(20)}
    write_tar(tmp_path / "sorted-0.tar", files)
    assert main(["index", str(tmp_path / "sorted-*.tar"), "--labels", "key"]) == 0
    assert "sorted by class: 96% of neighbours share a label (24.1% if shuffled)" in capsys.readouterr().out
    names = np.random.default_rng(0).permutation(sorted(files)).tolist()
    write_tar(tmp_path / "mixed-0.tar", {name: files[name] for name in names})
    assert main(["index", str(tmp_path / "mixed-*.tar"), "--labels", "key"]) == 0
    assert "sorted" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_what_can_not_be_read_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards(tmp_path, [2])
    with pytest.raises(DataError, match=r"index .*cannot be written: .*--index DIR"):
        build_index(pattern, progress=False, folder=str(tmp_path / "train-0000.tar" / "below"))
    index_of(pattern)

    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    for function in ("index.fingerprint", "scan.samples"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(DataError, match=r"train-0000.tar: cannot be read: Permission denied"),
        ):
            patch.setattr(f"trainer.data.shards.{function}", forbidden)
            open_index(pattern) if function == "index.fingerprint" else index_of(pattern)


def test_reads_are_coalesced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(write_shards(tmp_path, [40, 40]))
    reads: list[int] = []
    preadv = os.preadv

    def counted(file: int, buffers: list[memoryview], at: int) -> int:
        reads.append(at)
        return preadv(file, buffers, at)

    monkeypatch.setattr(os, "preadv", counted)
    ids = np.random.default_rng(0).permutation(80)
    got = Reader(index).read(np.concatenate([ids, ids[:3]]))
    assert len(reads) == 2, "one read a shard"
    assert [bytes(g) for g in got[:80]] == [jpeg(int(i)) for i in ids]  # pyright: ignore[reportArgumentType]
    assert bytes(got[80]) == bytes(got[0])  # pyright: ignore[reportArgumentType]
    assert Reader(index).read(np.empty(0, np.int64)) == []


def test_a_shard_that_shrinks_while_reading_costs_its_examples_only(tmp_path: Path) -> None:
    index = index_of(write_shards(tmp_path, [3, 3]))
    reader = Reader(index)
    reader.read(np.arange(6))
    with open(tmp_path / "train-0001.tar", "r+b") as file:
        file.truncate(int(index.offset[4]) + 10)
    got = reader.read(np.arange(6))
    assert [isinstance(g, DataError) for g in got] == [False] * 4 + [True] * 2
    assert "train-0001.tar" in str(got[5])
    (tmp_path / "train-0000.tar").unlink()
    assert all(isinstance(g, DataError) for g in Reader(index).read(np.arange(3)))
