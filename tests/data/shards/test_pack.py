"""`pack` takes images in every usual layout, shuffles once by seed, continues after a kill, and never mixes two sources."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.support.images import encoded, jpeg, picture, write_tar
from trainer.data.errors import DataError
from trainer.data.shards.index import Index, open_index
from trainer.data.shards.pack import pack
from trainer.data.shards.reader import Reader

CLASSES = ("cat", "ant", "bee")
FLAT = {f"{CLASSES[i % 3]}_{i:02d}.jpg": jpeg(i) for i in range(12)}
FOLDERS = {f"{CLASSES[i % 3]}/{i:02d}.JPEG": jpeg(i) for i in range(12)}


def content(index: Index) -> dict[str, tuple[bytes, str]]:
    data = Reader(index).read(np.arange(len(index)))
    return {
        index.key(i): (bytes(data[i]), index.classes[index.labels[i]])  # pyright: ignore[reportArgumentType]
        for i in range(len(index))
    }


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def source(tmp: Path, form: str) -> Path:
    if form == "folders":
        return write_folder(tmp / "src", FOLDERS | {"cat/.hidden.jpg": b"x", "cat/notes.txt": b"x"})
    if form == "flat folder":
        return write_folder(tmp / "src", FLAT)
    if form == "folders under one name":
        return write_folder(tmp / "src", {f"dataset/v1/{k}": v for k, v in FOLDERS.items()})
    if form == "tar":
        return write_tar(tmp / "src.tar", {f"./{k}": v for k, v in FOLDERS.items()})
    if form in ("tar.xz", "tar.gz", "tar.bz2"):
        return write_tar(tmp / f"src.{form}", FLAT, f"w:{form[4:]}")
    inner = {}
    for name in CLASSES:
        path = write_tar(tmp / f"{name}.tar", {k.split("/")[1]: v for k, v in FOLDERS.items() if k.startswith(name)})
        inner[path.name] = path.read_bytes()
    return write_tar(tmp / "src.tar", inner)


@pytest.mark.parametrize(
    "form", ["folders", "flat folder", "folders under one name", "tar", "tar.xz", "tar.gz", "tar.bz2", "tar of tars"]
)
def test_every_form_gives_the_same_shards(tmp_path: Path, form: str) -> None:
    index = pack(str(source(tmp_path, form)), tmp_path / "out", shard_size=5000, progress=False)["train"]
    assert content(index) == {f"{CLASSES[i % 3]}_{i:02d}": (jpeg(i), CLASSES[i % 3]) for i in range(12)}
    assert index.classes == sorted(CLASSES) and len(index.sizes) > 1 and index.sizes.min() >= index.sizes.max() - 1
    assert index.labels.tolist() != sorted(index.labels.tolist()), "shuffled"
    assert (tmp_path / "out" / "classes.txt").read_text().split() == sorted(CLASSES)
    assert not list((tmp_path / "out").glob(".*unpacked"))


@pytest.mark.parametrize("lines", ["name label", "name,label", "label", "heading"])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_flat_images_with_a_label_file(tmp_path: Path, kind: str, lines: str) -> None:
    files = {f"val_{i:03d}.JPEG": jpeg(i) for i in range(6)}
    src = (
        write_tar(tmp_path / "v.tar", files)
        if kind == "tar"
        else write_folder(tmp_path / "v", {f"x/{k}": v for k, v in files.items()})
    )
    text = {
        "name label": "".join(f"val_{i:03d}.JPEG {CLASSES[i % 3]}\n" for i in range(6)),
        "name,label": "".join(f"val_{i:03d},{CLASSES[i % 3]} 1 2 3 4\n" for i in range(6)),
        "label": "".join(f"{CLASSES[i % 3]}\n" for i in range(6)),
        "heading": "ImageId,Label\n" + "".join(f"val_{i:03d},{CLASSES[i % 3]}\n" for i in range(6)),
    }
    (tmp_path / "labels.txt").write_text(text[lines])
    index = pack(str(src), tmp_path / "out", labels=str(tmp_path / "labels.txt"), name="validation", progress=False)[
        "validation"
    ]
    assert content(index) == {f"val_{i:03d}": (jpeg(i), CLASSES[i % 3]) for i in range(6)}


def test_a_test_folder_without_labels_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As competitions have it: train/ID.jpg, test/ID.jpg, labels.csv. One label for it, and the others are missed."""
    src = write_folder(
        tmp_path / "src", {f"train/{i}.jpg": jpeg(i) for i in range(6)} | {f"test/{i}.jpg": jpeg(i) for i in (7, 8)}
    )
    labels = tmp_path / "labels.csv"
    labels.write_text("id,breed\n" + "".join(f"{i},{CLASSES[i % 3]}\n" for i in range(6)))
    splits = pack(str(src), tmp_path / "out", labels=str(labels), hold_out=0.5, progress=False, show=print)
    assert {name: len(index) for name, index in splits.items()} == {"train": 3, "validation": 3}
    assert "test: 2 images in test/ have no labels and are left out" in capsys.readouterr().out
    labels.write_text(labels.read_text() + "8,cat\n")
    with pytest.raises(
        DataError, match=r"no label for '7' and 0 more of 2 images; add their lines, or pack the folder of the others"
    ):
        pack(str(src), tmp_path / "again", labels=str(labels), progress=False)


def test_splits_share_the_order_of_classes(tmp_path: Path) -> None:
    files = {f"train/{k}": v for k, v in FOLDERS.items()} | {"test/cat/a.png": encoded(picture(99), "PNG")}
    indexes = pack(str(write_folder(tmp_path / "src", files)), tmp_path / "out", progress=False)
    assert set(indexes) == {"train", "test"} and indexes["test"].labels.tolist() == [2]
    assert indexes["train"].classes == indexes["test"].classes == ["ant", "bee", "cat"]
    pack(str(write_folder(tmp_path / "more", {"bee/1.jpg": jpeg(1)})), tmp_path / "out", name="extra", progress=False)
    assert open_index(str(tmp_path / "out" / "extra-*.tar")).labels.tolist() == [1]
    with pytest.raises(DataError, match=r"'yak' is not among the 3 classes"):
        pack(str(write_folder(tmp_path / "odd", {"yak/1.jpg": jpeg(1)})), tmp_path / "out", name="odd", progress=False)


def test_a_share_of_each_class_is_held_out(tmp_path: Path) -> None:
    """Seven cats, four ants, one bee: at .25 two, one and none; the rest is the training split, and another seed holds out others."""
    files = {f"{name}/{i}.jpg": jpeg(i) for name, count in (("cat", 7), ("ant", 4), ("bee", 1)) for i in range(count)}
    src = write_folder(tmp_path / "src", files)
    splits = pack(str(src), tmp_path / "out", hold_out=0.25, progress=False)
    assert [index.classes for index in splits.values()] == [["ant", "bee", "cat"]] * 2
    assert {name: np.bincount(index.labels, minlength=3).tolist() for name, index in splits.items()} == {
        "train": [3, 1, 5],
        "validation": [1, 0, 2],
    }
    whole = content(pack(str(src), tmp_path / "whole", progress=False)["train"])
    assert content(splits["train"]) | content(splits["validation"]) == whole and sum(map(len, splits.values())) == 12
    held = {
        seed: content(pack(str(src), tmp_path / f"{seed}", hold_out=0.25, seed=seed, progress=False)["validation"])
        for seed in (0, 1)
    }
    assert held[0] == content(splits["validation"]) and held[0].keys() != held[1].keys()
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(DataError, match=r"--hold-out .*: must be > 0 and < 1"):
            pack(str(src), tmp_path / "none", hold_out=share, progress=False)
    with pytest.raises(DataError, match=r"has the splits train, validation; leave --hold-out out"):
        pack("sklearn:digits", tmp_path / "digits", hold_out=0.1, progress=False)
    one = write_folder(tmp_path / "one", {"cat/1.jpg": jpeg(1), "ant/2.jpg": jpeg(2)})
    with pytest.raises(DataError, match="no class has two images"):
        pack(str(one), tmp_path / "few", hold_out=0.5, progress=False)


def test_digits_are_real_and_split_by_seed(tmp_path: Path) -> None:
    one = pack("sklearn:digits", tmp_path / "a", progress=False)
    two = pack("sklearn:digits", tmp_path / "b", seed=1, progress=False)
    assert (len(one["train"]), len(one["validation"])) == (1438, 359)
    keys = {split: {one[split].key(i) for i in range(len(one[split]))} for split in one}
    assert not keys["train"] & keys["validation"] and len(keys["train"] | keys["validation"]) == 1797
    assert keys["validation"] != {two["validation"].key(i) for i in range(359)}
    image = PIL.Image.open(io.BytesIO(content(one["train"])[one["train"].key(0)][0]))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
    from sklearn.datasets import load_digits

    number = int(one["train"].key(0).split("_")[1])
    assert (np.array(image) == (load_digits().images[number] * 255 / 16).round()).all()  # pyright: ignore
    assert load_digits().target[number] == one["train"].labels[0]  # pyright: ignore


def test_again_is_free_and_another_source_is_refused(tmp_path: Path) -> None:
    src, out = source(tmp_path, "folders"), tmp_path / "out"
    pack(str(src), out, shard_size=5000, progress=False)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    pack(str(src), out, shard_size=5000, progress=False)
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    (out / "train-000001.tar").unlink()
    pack(str(src), out, shard_size=5000, progress=False)
    assert {n: b for n, (_, b) in before.items() if n.endswith("tar")} == {p.name: p.read_bytes() for p in out.glob("*.tar")}
    for change in ({"seed": 1}, {"shard_size": 2000}, {"short_side": 16}):
        with pytest.raises(DataError, match=r"train shards of another source or setting exist"):
            pack(str(src), out, **{"shard_size": 5000, "progress": False} | change)


def test_a_second_split_of_the_same_images_is_refused(tmp_path: Path) -> None:
    src = write_folder(tmp_path / "src", FOLDERS)
    pack(str(src), tmp_path / "out", progress=False)
    with pytest.raises(DataError, match=r"validation has the same images as train; .* --hold-out 0.1"):
        pack(str(src), tmp_path / "out", name="validation", progress=False)
    assert not list((tmp_path / "out").glob("validation*"))


def test_killed_packing_continues(tmp_path: Path) -> None:
    files = {f"{CLASSES[i % 3]}/{i:04d}.jpg": jpeg(i, 200, 160) for i in range(60)}
    src, out = write_folder(tmp_path / "src", files), tmp_path / "out"
    call = f"from trainer.data.shards.pack import pack; pack({str(src)!r}, {str(out)!r}, shard_size=4000, workers=1, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", call])
    while process.poll() is None and len(list(out.glob("train-*.tar"))) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in out.glob("train-*.tar")}
    assert len(finished) >= 3
    index = pack(str(src), out, shard_size=4000, workers=1, progress=False)["train"]
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in finished.items())
    assert content(index) == {f"{CLASSES[i % 3]}_{i:04d}": (jpeg(i, 200, 160), CLASSES[i % 3]) for i in range(60)}


def test_shrunk_shards_say_so(tmp_path: Path) -> None:
    files = {
        "cat/wide.jpg": jpeg(1, 90, 60),
        "cat/small.jpg": jpeg(2, 30, 20),
        "ant/broken.jpg": b"\xff\xd8 no",
        "ant/t.png": encoded(picture(3, 50, 80), "PNG"),
    }
    index = pack(str(write_folder(tmp_path / "s", files)), tmp_path / "o", short_side=32, quality=80, progress=False)["train"]
    assert index.packing == "short side 32, JPEG quality 80"
    data = {key: value[0] for key, value in content(index).items()}
    sizes = {k: PIL.Image.open(io.BytesIO(v)).size for k, v in data.items() if "broken" not in k}
    assert sizes == {"cat_wide": (48, 32), "cat_small": (30, 20), "ant_t": (32, 51)}
    assert data["cat_small"] == files["cat/small.jpg"] and data["ant_broken"] == files["ant/broken.jpg"]


def test_refusals(tmp_path: Path) -> None:
    def refused(src: object, match: str, **options: object) -> None:
        with pytest.raises(DataError, match=match):
            pack(str(src), tmp_path / "out", progress=False, **options)  # pyright: ignore[reportArgumentType]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    refused(tmp_path / "nothing", "no such file")
    refused(write_folder(tmp_path / "a", {"x.txt": b""}), "no images")
    refused(write_folder(tmp_path / "b", {"x.jpg": jpeg(0), "y.jpg": jpeg(1)}), r"no class in.*--labels")
    refused(
        write_folder(tmp_path / "c", {"a/x.jpg": jpeg(0), "a/x.png": jpeg(0), "b/y.jpg": jpeg(1)}), r"both get the key 'a_x'"
    )
    numbers = tmp_path / "n.txt"
    numbers.write_text("1\n2\n")
    refused(write_folder(tmp_path / "d", {"x.jpg": jpeg(0), "y.jpg": jpeg(1)}), "start at 1", labels=str(numbers))
    numbers.write_text("0\n1\n2\n")
    refused(tmp_path / "d", "3 labels for 2 images", labels=str(numbers))
    numbers.write_text("x.jpg cat\n")
    refused(tmp_path / "d", r"no label for 'y'", labels=str(numbers))
    for options, match in (
        ({"shard_size": 0}, "--shard-size 0: must be > 0"),
        ({"short_side": -3}, "--short-side -3: must be >= 1 pixel"),
        ({"quality": 101}, "--quality 101: must be from 1 to 100"),
    ):
        refused(tmp_path / "d", match, **options)
    for options in ({"name": "train-extra"}, {"name": "a*"}, {"name": "../up"}):
        refused(tmp_path / "d", r"must be one word", **options)
    with pytest.raises(DataError, match=r"\*\?"):
        pack(str(tmp_path / "d"), tmp_path / "out[1]", progress=False)
    whole = lzma.compress(write_tar(tmp_path / "e.tar", FLAT).read_bytes())
    (tmp_path / "e.tar.xz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "e.tar.xz", "cannot be unpacked")
    (tmp_path / "f.tar").write_bytes((tmp_path / "e.tar").read_bytes()[:5000])
    refused(tmp_path / "f.tar", "truncated")


def test_a_full_disk_loses_no_finished_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out, fsync = source(tmp_path, "folders"), tmp_path / "out", os.fsync
    disk: list[str] = ["full"]

    def full(file: int) -> None:
        if disk and "train-000001.tar" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left.*run the same command again"):
        pack(str(src), out, shard_size=5000, workers=1, progress=False)
    assert (out / "train-000000.tar").is_file() and not list(out.glob(".writing-*"))
    disk.clear()
    (out / ".writing-train-000001.tar.4711").write_bytes(b"of a pack that was killed")
    assert len(pack(str(src), out, shard_size=5000, workers=1, progress=False)["train"]) == 12
    assert not list(out.glob(".writing-*"))
