"""Sources of `trilevel pack` with links, FIFOs and archives that are not what they seem."""

from __future__ import annotations

import bz2
import gzip
import inspect
import io
import lzma
import os
import pickle
import sys
from pathlib import Path

import PIL.Image
import pytest

from tests.support import layouts
from tests.support.images import encoded, jpeg, picture, write_tar
from trainer.data.errors import DataError
from trainer.data.shards import pack as module
from trainer.data.shards.pack import pack
from trainer.data.shards.source_files import list_files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number, name in enumerate(("a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg")):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(jpeg(number))
    return tmp_path / "src"


def test_a_fifo_is_refused(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "a" / "x.jpg")
    os.mkfifo(source / "a" / "notes.txt")  # not an image: ignored
    with pytest.raises(DataError, match=r"a/x.jpg: not a regular file"):
        pack(str(source), tmp_path / "out", progress=False, workers=1)


@pytest.mark.parametrize("links", [1, 3])
def test_a_link_loop_is_refused(source: Path, tmp_path: Path, links: int) -> None:
    for number in range(links):
        (source / "a" / f"loop{number}").symlink_to("..")
    with pytest.raises(DataError, match=r"a/loop0: a link to a folder that contains it"):
        pack(str(source), tmp_path / "out", progress=False, workers=1)


def test_a_folder_with_a_number_of_paths_that_doubles_with_each_link_is_refused(source: Path, tmp_path: Path) -> None:
    """18 folders with two links each have 2^18 paths, and the listing took hours."""
    (source / "n18").mkdir()
    for number in range(18):
        (source / f"n{number}").mkdir()
        for name in "xy":
            (source / f"n{number}" / name).symlink_to(f"../n{number + 1}")
    with pytest.raises(DataError, match=r"links lead to this folder on more than 16 paths; remove links"):
        list_files(str(source), tmp_path)


def test_folders_nested_deeper_than_python_recurses_are_listed(source: Path, tmp_path: Path) -> None:
    below = "d/" * 200
    (source / "a" / below).mkdir(parents=True)
    (source / "a" / below / "x.jpg").write_bytes(jpeg(5))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 120)
    try:
        found = list_files(str(source), tmp_path)
    finally:
        sys.setrecursionlimit(before)
    assert f"a/{below}x.jpg" in [one.name for one in found.images]


@pytest.mark.parametrize("text", ["", "[]", '"x"', '{"source": 1}', "[" * 100_000, "folder"])
def test_a_plan_that_no_pack_wrote_is_none(text: str, source: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "out" / ".train.plan.json"
    out.mkdir()
    plan.mkdir() if text == "folder" else plan.write_text(text)
    if text == "folder":
        with pytest.raises(DataError, match=r"writing .train.plan.json: Is a directory; move it away"):
            pack(str(source), out, progress=False, workers=1)
        return
    assert len(pack(str(source), out, progress=False, workers=1)["train"]) == 4
    plan.write_text(text)
    with pytest.raises(DataError, match=r"train shards of another source or setting exist .*; use another --name or folder"):
        pack(str(source), out, progress=False, workers=1)


def test_a_folder_in_the_place_of_the_classes_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "classes.txt").mkdir(parents=True)
    with pytest.raises(DataError, match=r"writing classes.txt: Is a directory; move it away"):
        pack(str(source), tmp_path / "out", progress=False, workers=1)


def test_links_to_nothing_are_refused_and_others_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "5.jpg").write_bytes(jpeg(5))
    for name in ("c", "d"):  # twice the same folder is no loop
        (source / name).symlink_to(tmp_path / "elsewhere")
    (source / "d").unlink()
    (source / "b" / "6.jpg").symlink_to(tmp_path / "elsewhere" / "5.jpg")
    assert len(pack(str(source), tmp_path / "out", progress=False, workers=1)["train"]) == 6
    (source / "a" / "x.jpg").symlink_to(tmp_path / "missing")
    with pytest.raises(DataError, match=r"a/x.jpg: No such file or directory \(broken link\?\)"):
        pack(str(source), tmp_path / "other", progress=False, workers=1)


def test_the_left_over_of_another_archive_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two archives of one name and one size, one after the other, the first one killed on its way."""
    files = [{f"{c}/{i}.jpg": jpeg(7) for i, c in enumerate(classes)} for classes in ("aabb", "ccdd")]
    archives = []
    for content in files:
        plain = write_tar(tmp_path / "plain.tar", content).read_bytes()
        archives.append(gzip.compress(plain, compresslevel=0, mtime=0))
    assert len(archives[0]) == len(archives[1])
    (tmp_path / "x.tar.gz").write_bytes(archives[0])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_same_plan", killed)
        pack(str(tmp_path / "x.tar.gz"), tmp_path / "out", progress=False, workers=1)
    (tmp_path / "out" / "classes.txt").unlink()
    assert list((tmp_path / "out").glob(".*.unpacked"))
    (tmp_path / "x.tar.gz").write_bytes(archives[1])
    assert pack(str(tmp_path / "x.tar.gz"), tmp_path / "out", progress=False, workers=1)["train"].classes == ["c", "d"]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("damage", ["none", "flipped", "cut"])
def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path: Path, kind: str, damage: str) -> None:
    plain = write_tar(tmp_path / "plain.tar", {f"{c}/{i}.jpg": jpeg(i) for i, c in enumerate("aabb")}).read_bytes()
    data = bytearray({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](plain))
    if damage == "flipped":
        data[len(data) // 2 : len(data) // 2 + 3] = b"\0\0\0"
    content = {"none": b"hello" * 100, "flipped": bytes(data), "cut": bytes(data[: len(data) // 2])}[damage]
    (tmp_path / f"x.tar.{kind}").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be unpacked"):
        pack(str(tmp_path / f"x.tar.{kind}"), tmp_path / "out", progress=False, workers=1)
    assert os.listdir(tmp_path / "out") == []


def test_planted_links_in_a_shared_folder_are_not_followed(source: Path, tmp_path: Path) -> None:
    """The names of files that are being written can't be guessed, see `atomic_write`."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out").mkdir()
    mine = os.getpid()
    for name in (".train-000000.tar.partial", "classes.partial", f".train.index.{mine}", f".writing-classes.txt.{mine}"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "victim")
    (tmp_path / "out" / "classes.txt").symlink_to(tmp_path / "nothing")  # replaced
    pack(str(source), tmp_path / "out", progress=False, workers=1)
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "nothing").exists()


def test_shrinking_opens_no_other_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's plugin for EPS starts Ghostscript on what a file holds, whatever its name is."""
    eps = io.BytesIO()
    picture(0, 64, 64).save(eps, "EPS")
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
    (tmp_path / "src" / "a" / "1.jpg").write_bytes(eps.getvalue())
    (tmp_path / "src" / "b" / "2.jpg").write_bytes(encoded(PIL.Image.new("RGB", (64, 64))))
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: started.append(a))
    index = pack(str(tmp_path / "src"), tmp_path / "out", short_side=32, progress=False, workers=1)["train"]
    assert len(index) == 2 and not started


class _Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_among_the_batches_of_cifar_runs_nothing(tmp_path: Path) -> None:
    for name in ("meta", "train", "test"):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_bytes(pickle.dumps({b"fine_label_names": _Touch(tmp_path / "made")}, 2))
    with pytest.raises(DataError, match=r"not a batch of CIFAR's python version: it names posix.mkdir"):
        pack(str(tmp_path / "src"), tmp_path / "out", progress=False, workers=1)
    assert not (tmp_path / "made").exists()
    (tmp_path / "src" / "meta").write_bytes(b"\x80\x02}(U\x04")
    with pytest.raises(DataError, match=r"not a batch of CIFAR's python version"):
        pack(str(tmp_path / "src"), tmp_path / "out", progress=False, workers=1)


def test_damaged_lists_and_tables_are_named(tmp_path: Path) -> None:
    def refused(src: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            pack(str(src), tmp_path / "out", progress=False, workers=1)

    parquet = next((layouts.parquet(tmp_path / "parquet") / "data").glob("train*"))
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[:-20])
    refused(tmp_path / "parquet", r"cannot be read as parquet: .*download it again")
    parquet.write_bytes(bytes(200) + whole[200:])  # a page, not the footer
    refused(tmp_path / "parquet", r"cannot be read as parquet|has no bytes")
    assert not list((tmp_path / "out").glob("*.tar"))

    tars = layouts.ilsvrc_tars(tmp_path / "tars")
    devkit = tars / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(devkit.read_bytes()[:-100])
    refused(tars, r"ILSVRC2012_devkit_t12.tar.gz cannot be read|meta.mat cannot be read")
    folders = layouts.ilsvrc_folders(tmp_path / "folders")
    meta = folders / "ILSVRC2012_devkit_t12" / "data" / "meta.mat"
    meta.write_bytes(b"MATLAB 5.0" + bytes(range(256)))
    refused(folders, r"meta.mat cannot be read")

    files = layouts.metadata_folder(tmp_path / "metadata")
    (tmp_path / "outside.jpg").write_bytes(jpeg(0))
    lines = (files / "train" / "metadata.csv").read_text()
    (files / "train" / "metadata.csv").write_text(f"{lines}../../outside.jpg,n01440764\n")
    refused(files, r"row 49, '../../outside.jpg': that image does not exist")


def test_a_data_set_of_the_hub_is_downloaded_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hf download ORG/NAME --repo-type dataset --local-dir DIR"):
        pack("hf://datasets/org/name", tmp_path / "out", progress=False)
