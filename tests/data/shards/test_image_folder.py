"""Class folders without packing: the index lists the files, is checked like one of shards, and gives the same images and labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import layouts
from tests.support.images import jpeg
from tests.support.layouts import TRAIN, VALIDATION, WNIDS
from trainer.__main__ import main
from trainer.config.load import load
from trainer.data.errors import DataError
from trainer.data.order import EpochOrder, Layout
from trainer.data.shards import location
from trainer.data.shards.index import Index, build_index, open_index
from trainer.data.shards.pack import pack
from trainer.data.shards.reader import Reader
from trainer.preflight.check import check
from trainer.preflight.verify_shards import verify


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "cache"))
    return layouts.image_folder(tmp_path / "pets")


def content(index: Index) -> list[tuple[bytes, str]]:
    data = Reader(index).read(np.arange(len(index)))
    return sorted((bytes(one), index.classes[label]) for one, label in zip(data, index.labels, strict=True))  # pyright: ignore[reportArgumentType]


def test_the_index_of_a_folder_gives_what_packing_gives(folder: Path, tmp_path: Path) -> None:
    index = build_index(f"{folder}/train", progress=False)
    assert index.is_files() and content(index) == sorted(TRAIN.values()) and index.classes == list(WNIDS)
    packed = pack(str(folder), tmp_path / "shards", progress=False, workers=1)
    assert (
        content(packed["train"]) == content(index)
        and packed["train"].classes == index.classes
        and not packed["train"].is_files()
    )
    assert {index.key(i) for i in range(len(index))} == {packed["train"].key(i) for i in range(len(index))}
    again = open_index(f"{folder}/train")
    assert again.seal == index.seal and again.path.is_relative_to(tmp_path / "cache"), "nothing is written beside the images"
    assert sorted(p.name for p in (folder / "train").iterdir()) == list(WNIDS)
    assert content(build_index(f"{folder}/val", progress=False)) == sorted(VALIDATION.values())


def test_every_image_is_in_an_epoch_once_and_in_another_order_in_the_next(folder: Path) -> None:
    index = build_index(f"{folder}/train", progress=False)
    orders = [EpochOrder(Layout(index.sizes, 0, 8, 2, 16), epoch) for epoch in range(2)]
    rows = [np.concatenate([order.rows(step).ids for step in range(order.steps)]).tolist() for order in orders]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(len(index))) and rows[0] != rows[1]


def test_changes_behind_the_index_are_refused_by_name(folder: Path) -> None:
    build_index(f"{folder}/train", progress=False)
    name = next(iter(TRAIN))
    path = folder / "train" / WNIDS[0] / f"{name}.JPEG"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(
        DataError, match=rf"{name}.JPEG changed since it was indexed; restore it or run `trilevel index '{folder}/train'`"
    ):
        open_index(f"{folder}/train")
    path.write_bytes(data)
    open_index(f"{folder}/train")
    os.utime(path, (1, 1))
    assert len(open_index(f"{folder}/train")) == len(TRAIN), "a new time stamp alone is no change"
    (path.parent / "new.JPEG").write_bytes(jpeg(1000))
    with pytest.raises(DataError, match=r"new.JPEG is not in the index"):
        open_index(f"{folder}/train")
    (path.parent / "new.JPEG").unlink()
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}.JPEG is in the index .* but missing"):
        open_index(f"{folder}/train")


def test_what_cannot_be_read_without_packing_names_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"index .* not found; run `trilevel index"):
        open_index(f"{folder}/train")
    with pytest.raises(
        DataError, match=rf"has the splits train, validation; give the folder of one, e.g. data.train={folder}/train"
    ):
        build_index(str(folder), progress=False)
    with pytest.raises(DataError, match=r"whose class is its folder; leave --labels out"):
        build_index(f"{folder}/train", "key", progress=False)
    tiny = layouts.tiny_imagenet(tmp_path / "tiny")
    with pytest.raises(DataError, match=rf"has the layout tiny_imagenet, which has to be packed: trilevel pack {tiny} DST"):
        build_index(str(tiny), progress=False)
    monkeypatch.setattr(location, "_MOST_FILES", 20)
    with pytest.raises(DataError, match=r"48 image files, at most 20 can be read without packing"):
        build_index(f"{folder}/train", progress=False)


def test_the_commands_take_a_folder_and_name_the_price(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["init", "pets", "--epochs", "4"]) == 0
    assert "48 training and 24 validation images, 3 classes" in capsys.readouterr().out
    config = load("pets.yaml")
    assert (config.data.train, config.data.validation) == ("pets/train", "pets/val")
    text = check(config, world=1).text()
    assert "warning: pets/train: 48 image files are opened one by one, which is slower than shards" in text
    assert main(["index", "pets/val"]) == 0 and "pets/val: 24 image files, 3 classes; index: " in capsys.readouterr().out
    path = folder / "val" / WNIDS[0] / "ILSVRC2012_val_00000001.JPEG"
    path.write_bytes(b"no image")
    assert main(["index", "pets/val"]) == 0
    assert [one.reason for one in verify("pets/val", progress=False)] == ["no image"]
    layouts.kaggle(folder.parent / "raw")
    assert main(["init", "raw"]) == 2
    assert (
        "layout kaggle_ilsvrc; pack it first: trilevel pack raw shards/raw, then: trilevel init shards/raw"
        in capsys.readouterr().err
    )
