"""Labels that cannot be right are refused before training, and classes without images are named: every case trained silently before."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.images import config, jpeg, write_tar
from trainer.cli.arguments import parse
from trainer.cli.commands import COMMANDS
from trainer.data.errors import DataError
from trainer.data.loader.dataset import check_classes, check_labels, class_warnings
from trainer.data.shards.index import Index, build_index
from trainer.data.shards.one_based import counts_from_one
from trainer.preflight.check import check


def of(folder: Path, stem: str, labels: Sequence[int | str], classes: Sequence[object] = ()) -> Index:
    """The index of a shard with an image per label; classes: lines of a classes.txt beside it."""
    (folder / stem).mkdir(parents=True)
    if classes:
        (folder / stem / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    files = {}
    for number, label in enumerate(labels):
        files |= {f"{number:03d}.jpg": jpeg(number), f"{number:03d}.cls": str(label).encode()}
    return build_index(str(write_tar(folder / stem / f"{stem}.tar", files)), progress=False)


@pytest.mark.parametrize(
    ("train", "validation", "words"),
    [
        ("xyz", "xz", ["3 classes in", "('y' only there) and 2 classes in"]),
        ("xy", ["x", "y", "images"], ["2 classes in", "and 3 classes in", "('images' only there)"]),
        ("abcdefghi", "ab", ["'c', 'd', 'e', 'f', 'g', 'h' and 1 more only there"]),
        ("xxx", "xx", ["all 3 training images have the label 'x'", "check data.labels"]),
        ([0, 1, 1, 0], [2, 2], ["no validation image is of a class that has training images", "'2'", "'0', '1'"]),
        ([0, 1, 2, 1], [1, 2, 3], ["labels are the numbers 1 to 3, and none is 0", "validation", "count from 0, to 2"]),
        ([1, 2, 3, 1], [1, 2], ["labels are the numbers 1 to 3, and none is 0", "classes.txt with the lines 1 to 3"]),
    ],
)
def test_classes_that_cannot_be_right_are_refused(tmp_path: Path, train: Sequence, validation: Sequence, words: list[str]):
    with pytest.raises(DataError) as error:
        check_classes(of(tmp_path, "train", train), of(tmp_path, "validation", validation))
    for word in words:
        assert word in str(error.value)


def test_the_training_images_as_validation_images_are_reported(tmp_path: Path):
    """A small validation set without class 0 is none of labels from one."""
    train = of(tmp_path, "train", [0, 1, 2, 2])
    assert class_warnings(train, train, 3) == [
        "data.validation has the same shards as data.train: the score is that of images it was trained with"
    ]
    check_classes(train, of(tmp_path, "validation", [1, 2]))


def test_training_shards_that_contain_those_of_validation_are_reported(tmp_path: Path):
    """As with data.train='shards/*.tar' in a folder that has both; by content, so under another name too."""
    validation = of(tmp_path, "validation", [0, 1, 2, 1])
    both = tmp_path / "both"
    both.mkdir()
    write_tar(both / "a.tar", {"x.jpg": jpeg(7), "x.cls": b"0"})
    shutil.copy(tmp_path / "validation" / "validation.tar", both / "b.tar")
    train = build_index(str(both / "*.tar"), progress=False)
    (warning,) = class_warnings(train, validation, 3)
    assert warning.startswith(
        "data.train contains 1 of the 1 shards of data.validation (validation.tar): 4 of its 4 images are trained with;"
    )
    assert class_warnings(of(tmp_path, "other", [0, 1, 2]), validation, 3) == []


def test_another_order_of_the_same_names_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"the same 3 classes in another order: class 0 is 'x' in .* and 'z' in .*classes.txt"):
        check_classes(of(tmp_path, "train", "xyz", "xyz"), of(tmp_path, "validation", "xyz", "zyx"))


def test_the_same_names_and_numbers_beside_names_pass(tmp_path: Path):
    named, numbered = of(tmp_path, "named", "xyz"), of(tmp_path, "numbered", [0, 1, 2, 2])
    check_classes(named, of(tmp_path, "other", "zyx"))
    for train, validation, which in ((named, numbered, "data.train"), (numbered, named, "data.validation")):
        check_classes(train, validation)
        (warning,) = class_warnings(train, validation, 3)
        assert warning.startswith(f"labels of {which} are names") and "0 as 'x', 1 as 'y', 2 as 'z'" in warning
    more = of(tmp_path, "more", [0, 1, 2, 1])
    assert class_warnings(named, of(tmp_path, "again", "xxyz"), 3) == [] and class_warnings(numbered, more, 3) == []
    sparse = of(tmp_path, "sparse", [1, 3])  # a subset: 2 is missing too
    assert not counts_from_one(sparse) and not counts_from_one(numbered) and not counts_from_one(named)


def test_classes_without_training_images_are_named(tmp_path: Path):
    train, validation = of(tmp_path, "train", [0, 2, 2]), of(tmp_path, "validation", [0, 1, 1, 3])
    assert class_warnings(train, validation, 4) == [
        "2 of model.classes=4 classes have no training image: '1', '3'; 3 validation images are of these classes"
    ]
    assert class_warnings(train, train, 1000)[0].startswith(
        "998 of model.classes=1000 classes have no training image: '1', '3', '4', "
    )
    huge = class_warnings(train, train, 10**12)[0]  # a typo: no array of that length
    assert huge.startswith("999999999998 of model.classes=1000000000000") and "more" in huge
    (alone,) = class_warnings(of(tmp_path, "both", [0, 1]), of(tmp_path, "one", [1, 1, 1]), 2)
    assert alone == "all 3 validation images have the label '1'"


def test_labels_from_one_are_named_by_index_and_a_file_of_names_repairs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Labels 1 to 3 became 4 classes, the first one empty, and the hint for model.classes=3 was to set 4."""
    index = of(tmp_path, "train", [3, 1, 2])
    with pytest.raises(DataError, match=r"label 3 is outside model.classes=3 .*labels are the numbers 1 to 3") as error:
        check_labels(index, 3)
    assert "set model.classes=4" not in str(error.value)
    a = parse(["index", str(tmp_path / "train" / "train.tar")])
    COMMANDS["index"](a)
    assert "warning: labels are the numbers 1 to 3, and none is 0; if they count from 1" in capsys.readouterr().out
    (tmp_path / "train" / "classes.txt").write_text("1\n2\n3\n")
    COMMANDS["index"](a)
    assert "warning" not in capsys.readouterr().out
    again = build_index(str(tmp_path / "train" / "train.tar"), progress=False)
    assert again.classes == ["1", "2", "3"] and list(again.labels) == [2, 0, 1]
    check_labels(again, 3)
    check_classes(again, again)
    names = of(tmp_path, "names", [0, 2], ["cat", "dog", "owl"])  # numbers are positions where the file has other names
    assert list(names.labels) == [0, 2]


def test_an_error_names_a_few_members_of_many(tmp_path: Path):
    """Keys with dots, img.0001.jpg, are one sample for webdataset: 400 members once stood in one line of 7 kB."""
    path = write_tar(tmp_path / "x.tar", {f"img.{number:04d}.jpg": jpeg(0) for number in range(400)})
    with pytest.raises(DataError) as error:
        build_index(str(path), progress=False)
    assert "key 'img' has 400 images among its 400 members (.0000.jpg, .0001.jpg, " in str(error.value)
    assert "and 394 more)" in str(error.value) and len(str(error.value)) < 500


def test_an_error_names_the_members_of_a_key_without_an_image(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", {"a.txt": b"1", "a.cls": b"0"})
    with pytest.raises(DataError, match=r"key 'a' has 0 images among its 2 members \(\.cls, \.txt\), must have 1"):
        build_index(str(path), progress=False)


def test_check_prints_the_warnings(tmp_path: Path):
    index = of(tmp_path, "train", [0, 1, 3] * 8)
    found = check(config(str(tmp_path / "train" / "train.tar")), 1)
    missing, same = found.text().splitlines()[-2:]
    assert len(index) == 24 and "1 of model.classes=4 classes have no training image: '2'" in missing
    assert "data.validation has the same shards as data.train" in same
