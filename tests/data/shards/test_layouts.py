"""`pack` recognises the layouts that people have and gives every image its class; what is unclear is refused by name."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.support import layouts
from tests.support.images import jpeg, write_tar
from tests.support.layouts import TRAIN, VALIDATION, WNIDS, write_files
from trainer.__main__ import main
from trainer.cli.arguments import parse
from trainer.data.errors import DataError
from trainer.data.shards.index import Index
from trainer.data.shards.layouts import LAYOUTS, recognise
from trainer.data.shards.layouts.hugging_face_folder import label_column
from trainer.data.shards.pack import pack
from trainer.data.shards.reader import Reader
from trainer.data.shards.source_files import list_files


def content(index: Index) -> list[tuple[bytes, str]]:
    data = Reader(index).read(np.arange(len(index)))
    pairs = [(bytes(one), index.classes[label]) for one, label in zip(data, index.labels, strict=True)]  # pyright: ignore[reportArgumentType]
    return sorted(pairs)


def packed(src: Path, out: Path, **options: Any) -> dict[str, Index]:
    return pack(str(src), out, progress=False, workers=1, **options)


def refused(src: Path, match: str, **options: Any) -> None:
    with pytest.raises(DataError, match=match):
        packed(src, src.parent / "refused", **options)


FORMS = {
    **layouts.LAYOUTS,
    "ilsvrc folders": layouts.ilsvrc_folders,
    "hugging_face_folder jsonl": lambda root: layouts.metadata_folder(root, "jsonl"),
    "hugging_face_parquet text": lambda root: layouts.parquet(root, names=None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_the_same_images_and_classes(tmp_path: Path, form: str) -> None:
    src, lines = FORMS[form](tmp_path / "src"), list[str]()
    assert recognise(list_files(str(src), tmp_path)).layout.name == form.split()[0]
    indexes = packed(src, tmp_path / "out", show=lines.append)
    assert set(indexes) == {"train", "validation"} and lines[0].startswith(f"layout {form.split()[0]}: ")
    assert content(indexes["train"]) == sorted(TRAIN.values()) and content(indexes["validation"]) == sorted(VALIDATION.values())
    assert indexes["train"].classes == indexes["validation"].classes == list(WNIDS)
    assert not list((tmp_path / "out").glob(".*unpacked"))


def test_a_folder_and_a_tar_of_class_tars(tmp_path: Path) -> None:
    src = layouts.class_tars(tmp_path / "src")
    outer = write_tar(tmp_path / "outer.tar", {path.name: path.read_bytes() for path in sorted(src.iterdir())})
    for number, one in enumerate((src, outer)):
        index = packed(one, tmp_path / f"out{number}")["train"]
        assert content(index) == sorted(TRAIN.values())


def test_images_without_labels_are_left_out_and_named(tmp_path: Path) -> None:
    for form, where in (("tiny_imagenet", "test/"), ("kaggle_ilsvrc", "test/")):
        lines: list[str] = []
        packed(layouts.LAYOUTS[form](tmp_path / form), tmp_path / f"{form}-out", show=lines.append)
        assert f"test: 2 images in {where} have no labels and are left out" in lines
    files = {f"train/{c}/{i}.jpg": jpeg(i) for i, c in enumerate("aabb")} | {f"test/x_{i}.jpg": jpeg(9 + i) for i in range(3)}
    lines = []
    assert set(packed(write_files(tmp_path / "folders", files), tmp_path / "folders-out", show=lines.append)) == {"train"}
    assert "test: 3 images in test/ have no labels and are left out" in lines


@pytest.mark.parametrize("archive", [False, True])
def test_cifar_keeps_every_pixel(tmp_path: Path, archive: bool) -> None:
    src, rows = layouts.cifar(tmp_path / "src", archive)
    indexes = packed(src, tmp_path / "out")
    assert {split: len(index) for split, index in indexes.items()} == {"train": 10, "test": 2}
    assert indexes["train"].classes == ["airplane", "automobile", "bird"]
    for index in indexes.values():
        for i, data in enumerate(Reader(index).read(np.arange(len(index)))):
            image = np.array(PIL.Image.open(io.BytesIO(data)))  # pyright: ignore[reportArgumentType]
            assert (image.transpose(2, 0, 1).ravel() == rows[index.key(i)]).all()
            assert index.key(i).startswith(index.classes[index.labels[i]])


def test_cifar_100_has_its_fine_classes(tmp_path: Path) -> None:
    fine = ["apple", "bear", "crab"]
    files: dict[str, Any] = {"meta": {"fine_label_names": fine, "coarse_label_names": ["food", "animal"]}}
    for name in ("train", "test"):
        files[name] = {"data": np.zeros((3, 3072), np.uint8), "fine_labels": [2, 0, 1], "coarse_labels": [1, 0, 1]}
    src = write_files(tmp_path / "src", {f"cifar-100-python/{n}": pickle.dumps(value, 2) for n, value in files.items()})
    index = packed(src, tmp_path / "out")["train"]
    assert index.classes == fine and sorted(index.labels.tolist()) == [0, 1, 2]


def test_parquet_with_two_label_columns_and_without_labels(tmp_path: Path) -> None:
    more = {"coarse": {"_type": "ClassLabel", "names": ["fish"]}}
    src = layouts.parquet(tmp_path / "src", more=more)
    refused(
        src,
        r"columns label, coarse; choose that of the class with --labels column:NAME".replace("label, coarse", ".*coarse.*"),
        labels="column:x",
    )
    index = packed(src, tmp_path / "out", labels="column:label")["train"]
    assert content(index) == sorted(TRAIN.values())
    single = packed(layouts.parquet(tmp_path / "one") / "data" / "train-00000-of-00001.parquet", tmp_path / "single")
    assert content(single["train"]) == sorted(TRAIN.values())


def test_parquet_files_of_which_some_are_missing_or_of_several_configurations(tmp_path: Path) -> None:
    src = layouts.parquet(tmp_path / "src")
    part = src / "data" / "train-00000-of-00001.parquet"
    (src / "other").mkdir()
    (src / "other" / "train.parquet").write_bytes(part.read_bytes())
    refused(src, r"train files in 2 folders \(data, other\).*trilevel pack SRC/FOLDER DST")
    (src / "other" / "train.parquet").unlink()
    part.rename(src / "data" / "train-00001-of-00002.parquet")
    refused(src, r"1 of the 2 files data/train-\*-of-00002.parquet; download the others")
    alone = packed(src / "data" / "train-00001-of-00002.parquet", tmp_path / "alone")
    assert content(alone["train"]) == sorted(TRAIN.values())


def test_webdataset_tars_with_json_need_the_field(tmp_path: Path) -> None:
    src = layouts.webdataset(tmp_path / "src", "json")
    refused(src, r"has no \.cls.*--labels json:FIELD")
    assert content(packed(src, tmp_path / "out", labels="json:wnid")["validation"]) == sorted(VALIDATION.values())


def test_a_folder_of_validation_images_names_the_option_for_labels(tmp_path: Path) -> None:
    tiny = layouts.tiny_imagenet(tmp_path / "src") / "tiny-imagenet-200"
    refused(tiny / "val", r"all 24 images have one class, '(images|ILSVRC2012)'.*--labels FILE")
    packed(tiny / "train", tmp_path / "out")
    with pytest.raises(DataError, match=r"is not among the 3 classes of .*classes.txt.*--labels FILE"):
        packed(tiny / "val", tmp_path / "out", name="validation")
    index = packed(tiny / "val", tmp_path / "out", name="validation", labels=str(tiny / "val" / "val_annotations.txt"))
    assert content(index["validation"]) == sorted(VALIDATION.values())


def test_a_layout_that_could_be_two_has_to_be_chosen(tmp_path: Path) -> None:
    names = ("a/airfield", "a/alley", "b/bakery", "b/bakery/shop")
    src = write_files(tmp_path / "src", {f"{name}/{i}.jpg": jpeg(10 * i + k) for k, name in enumerate(names) for i in range(2)})
    refused(src, r"2 layouts fit: class_folders \(.*2 classes.*inner_folders \(.*4 classes.*--layout NAME")
    assert packed(src, tmp_path / "outer", layout="class_folders")["train"].classes == ["a", "b"]
    assert packed(src, tmp_path / "inner", layout="inner_folders")["train"].classes == list(names)
    refused(src, r"--layout places: unknown value; valid values: tiny_imagenet, ", layout="places")
    refused(src, r"does not have the layout cifar", layout="cifar")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("train/a/1 train/b/2 val/images/3", r"class 'images' of validation has no training images.*--labels FILE"),
        ("train/a/1 train/b/2 val/a/3 docs/4", r"'train', 'val' are folders of splits, but 'docs' beside them"),
        ("train/a/1 train/b/2 val/a/3 cover", r"'train', 'val' are folders of splits, but 'cover.jpg' beside them"),
        ("a/train/1 a/test/2 b/train/3 b/test/4", r"the folders test, train lie inside the class folders"),
        ("a/1 b/2 logo_3", r"no class for 1 of 3 images of train, e.g. 'logo_3.jpg'"),
        ("train/a/1 train/b/2 val/3 val/4", r"no class for 2 of 2 images of validation.*--labels FILE"),
        ("a/1 a/2", r"all 2 images have one class, 'a', must be >= 2"),
        ("train/n01440764/1 train/n01443537/2 val/ILSVRC2012_val_00000001", r"neither the devkit nor.*devkit_t12.tar.gz"),
        ("CLS-LOC/train/n01440764/1 CLS-LOC/val/ILSVRC2012_val_00000001", r"no LOC_val_solution.csv"),
    ],
)
def test_what_is_unclear_is_refused(tmp_path: Path, names: str, words: str) -> None:
    refused(
        write_files(
            tmp_path / "src", {f"{name}.jpg" if "val_0" not in name else f"{name}.JPEG": jpeg(0) for name in names.split()}
        ),
        words,
    )


def test_folders_that_splits_share_with_a_class_stay_classes(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", {f"{name}/1.jpg": jpeg(i) for i, name in enumerate(("train", "bus", "tram"))})
    assert packed(src, tmp_path / "out")["train"].classes == ["bus", "train", "tram"]
    images = {f"{c}/{kind}/{i}.jpg": jpeg(i) for c in "ab" for i, kind in enumerate(("front", "back"))}
    deep = write_files(tmp_path / "deep", images)  # parts of the classes a and b, or folds with the classes back and front
    refused(deep, "2 layouts fit: class_folders .*2 classes.*inner_folders .*--layout NAME")
    assert packed(deep, tmp_path / "deeper", layout="class_folders")["train"].classes == ["a", "b"]
    one = {f"{c}/images/{i}.jpg": jpeg(i) for i, c in enumerate("ab")}
    assert packed(write_files(tmp_path / "one", one), tmp_path / "flat")["train"].classes == ["a", "b"]
    lone = write_files(tmp_path / "lone", {f"val/{c}/{c}.jpg": jpeg(i) for i, c in enumerate("ab")})
    assert set(packed(lone, tmp_path / "alone")) == {"validation"}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("data-00000-of-00001.arrow", "save_to_disk.*to_parquet"),
        ("train-00001.tfrecord", "TFRecord"),
        ("train-images-idx3-ubyte.gz", "idx"),
        ("data_batch_1.bin", "binary version.*python version"),
        ("tiny.zip", "unpack it"),
        ("notes.md", "1 other files, e.g. 'notes.md'"),
    ],
)
def test_forms_that_are_not_read_are_named(tmp_path: Path, file: str, words: str) -> None:
    src = write_files(tmp_path / "src", {file: b"x" * 10})
    refused(src, rf"no images found: .*{words}")
    if file.endswith(".zip"):
        refused(src / file, words)


def test_the_command_prints_what_it_recognised_and_what_each_split_holds(tmp_path: Path, capsys: Any) -> None:
    src = layouts.tiny_imagenet(tmp_path / "src")
    assert main(["pack", str(src), str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "layout tiny_imagenet: tiny-imagenet-200/val/val_annotations.txt labels the images in" in text
    assert f"validation: 24 images, 3 classes, 1 shards in {tmp_path}/out\n  images per class: min 8, median 8, max 8\n" in text
    examples = [line.split(" -> ") for line in text.splitlines() if " -> " in line]
    assert len(examples) == 10
    for name, label in examples:
        stem = Path(name).stem
        assert (TRAIN | VALIDATION)[stem][1] == label
    assert main(["pack", str(src), str(tmp_path / "out"), "--layout", "cifar"]) == 2


def test_names_of_layouts_are_unique_and_documented() -> None:
    names = [layout.name for layout in LAYOUTS]
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()
    assert len(set(names)) == len(names) and [name for name in names if f"`{name}`" not in page] == []


def test_the_help_of_pack_names_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["pack", "--help"])
    help_text = capsys.readouterr().out
    assert [layout.name for layout in LAYOUTS if not re.search(rf"\b{layout.name}\b", help_text)] == []


@pytest.mark.parametrize(
    ("columns", "given", "expected"),
    [
        (["label", "text"], None, "label"),
        (["kind"], None, "kind"),
        (["label", "kind"], "column:kind", "kind"),
        (["label"], "column:kind", ""),
        (["a", "b"], None, ""),
        ([], None, ""),
    ],
)
def test_the_column_of_the_class_is_clear_or_asked_for(columns: list[str], given: str | None, expected: str) -> None:
    if expected:
        assert label_column(columns, given, "pack SRC") == expected
        return
    with pytest.raises(DataError, match=r"pack SRC: columns .*choose that of the class with --labels column:NAME"):
        label_column(columns, given, "pack SRC")


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [("train_set", "test_set", "test"), ("train_images", "val-images", "validation"), ("train", "dev", "validation")],
)
def test_folders_with_a_split_in_their_names_are_splits(tmp_path: Path, train: str, other: str, split: str) -> None:
    """Their names were classes once: `train_set` and `test_set`, with exit code 0."""
    images = {
        f"{folder}/{c}/{folder}{i}.jpg": jpeg(10 * i + k) for k, folder in enumerate((train, other)) for i, c in enumerate("ab")
    }
    found = packed(write_files(tmp_path / "src", images), tmp_path / "out")
    assert set(found) == {"train", split} and all(index.classes == ["a", "b"] for index in found.values())


def test_pictures_of_other_formats_are_named_and_a_class_of_them_is_refused(tmp_path: Path, capsys: Any) -> None:
    images = {
        f"{c}/{i}.{ending}": jpeg(10 * k + i) for k, c in enumerate("ab") for i, ending in enumerate(("jpg", "jfif", "heic"))
    }
    src = write_files(tmp_path / "src", images)
    assert main(["pack", str(src), str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "2 files are not read (.heic), e.g. 'a/2.heic'" in text and "4 images, 2 classes" in text
    write_files(tmp_path / "src", {"c/1.avif": jpeg(99)})
    refused(
        src, r"no image of 'c' is read: the format of 'c/1\.avif' is one of .*convert them to JPEG or PNG, or remove the folder"
    )


def test_class_numbers_from_one_are_named_when_they_are_packed(tmp_path: Path, capsys: Any) -> None:
    src = write_files(tmp_path / "src", {f"{i}.jpg": jpeg(i) for i in range(6)})
    (tmp_path / "labels.txt").write_text("".join(f"{i}.jpg {1 + i % 3}\n" for i in range(6)))
    assert main(["pack", str(src), str(tmp_path / "out"), "--labels", str(tmp_path / "labels.txt")]) == 0
    text = capsys.readouterr().out
    assert "warning: labels are the numbers 1 to 3, and none is 0; if they count from 1, put a classes.txt" in text
