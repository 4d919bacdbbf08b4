"""Every image keeps its own label, and every class its number, whatever labels files and class names hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.http_server import serving
from tests.support.images import jpeg, write_shards, write_tar
from trainer.data.errors import DataError
from trainer.data.remote.cache import Cache
from trainer.data.shards.index import Index, build_index
from trainer.data.shards.pack import pack


def by_key(index: Index) -> dict[str, str]:
    return {index.key(i): index.classes[int(index.labels[i])] for i in range(len(index))}


def packed(folder: Path, names: list[str], lines: str) -> dict[str, str]:
    for number, name in enumerate(names):
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "src" / name).write_bytes(jpeg(number))
    (folder / "labels.txt").write_text(lines)
    return by_key(
        pack(str(folder / "src"), folder / "out", labels=str(folder / "labels.txt"), progress=False, workers=1)["train"]
    )


def indexed(folder: Path, keys: list[str], lines: str) -> dict[str, str]:
    write_tar(folder / "x.tar", {f"{key}.jpg": jpeg(number) for number, key in enumerate(keys)})
    (folder / "labels.txt").write_text(lines)
    return by_key(build_index(str(folder / "x.tar"), f"file:{folder / 'labels.txt'}", progress=False))


@pytest.mark.parametrize(
    ("names", "lines", "labels"),
    [
        (["x/1.jpg", "y/1.jpg"], "x/1.jpg cat\ny/1.jpg dog\n", {"x_1": "cat", "y_1": "dog"}),
        (["x/1.jpg", "y/1.jpg"], "data/y/1.jpg dog\ndata/x/1.jpg cat\n", {"x_1": "cat", "y_1": "dog"}),
        (["x/1.jpg", "y/2.jpg"], "1.jpg cat\n2.jpg dog\n", {"x_1": "cat", "y_2": "dog"}),
        (["a.1.jpg", "a.2.jpg"], "a.1.jpg cat\na.2.jpg dog\n", {"a_1": "cat", "a_2": "dog"}),
        (["1.jpg", "2.jpg"], "1.jpg cat\n2.jpg dog\n1.jpg cat\n", {"1": "cat", "2": "dog"}),
        (["1.jpg", "2.jpg"], "1.jpg\tgolden retriever\n2.jpg\tgolden eagle\n", {"1": "golden retriever", "2": "golden eagle"}),
        (["a b.jpg", "c d.jpg"], "a b.jpg,golden eagle,x\nc d.jpg,owl\n", {"a b": "golden eagle", "c d": "owl"}),
        (["1.jpg", "2.jpg"], 'name,label\r\n"1.jpg","cat, tame"\r\n2.jpg,dog\r\n', {"1": "cat, tame", "2": "dog"}),
        (["1.jpg", "2.jpg"], "Id,Boxes\n1,n01 1 2 3 4 n01 5 6 7 8\n2,n02 0 0 9 9\n", {"1": "n01", "2": "n02"}),
        (["1.jpg", "2.jpg"], "# a heading of words\n1.jpg cat\n2.jpg dog\n9.jpg of another set\n", {"1": "cat", "2": "dog"}),
    ],
)
def test_each_image_gets_the_label_of_its_own_line(
    tmp_path: Path, names: list[str], lines: str, labels: dict[str, str]
) -> None:
    assert packed(tmp_path, names, lines) == labels


@pytest.mark.parametrize(
    ("names", "lines", "reason"),
    [
        (["x/1.jpg", "y/1.jpg"], "1.jpg cat\n", r"line 1: '1.jpg' matches 2 images"),
        (["x/1.jpg", "y/1.jpg"], "x/1.jpg cat\nz/1.jpg dog\n", r"no label for 'y/1'"),
        (["1.jpg", "2.jpg"], "1.jpg cat\n2.jpg dog\n1.jpg owl\n", r"'1' has label 'cat' in line 1 and 'owl' in line 3"),
        (["1.jpg", "2.jpg"], "x/1.jpg cat\ny/1.jpg dog\n2.jpg owl\n", r"'1' has label 'cat' in line 1 and 'dog' in line 2"),
        (["1.jpg", "2.jpg"], "1.jpg golden retriever\n2.jpg golden eagle\n", r"line 1: 3 words for '1'; put a tab or a comma"),
        (["1.jpg", "2.jpg"], "1.jpg\t\n2.jpg\tdog\n", r"empty label"),
        (["1.jpg", "2.jpg"], "9" * 5000 + "\n1\n", r"has 5000 characters, must be <= 1000"),
        (["1.jpg", "2.jpg"], "1.jpg １\n2.jpg 1\n", r"invalid label '１'; use a class name or an integer >= 0"),
        (["1.jpg", "2.jpg"], f"1.jpg {'a' * 1001}\n2.jpg dog\n", r"has 1001 characters, must be <= 1000"),
    ],
)
def test_what_fits_two_ways_is_refused(tmp_path: Path, names: list[str], lines: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        packed(tmp_path, names, lines)


def test_foreign_shards_by_full_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "x/1.jpg,cat,more\ny/1.jpg,dog,more\nunknown.jpg,owl,more\n"
    assert indexed(tmp_path, ["x/1", "y/1"], lines) == {"x/1": "cat", "y/1": "dog"}
    assert "columns after the second are ignored (in 3 lines" in capsys.readouterr().err
    with pytest.raises(DataError, match="matches 2 images"):
        indexed(tmp_path, ["x/1", "y/1"], "1.jpg cat\n")
    (tmp_path / "labels.txt").write_bytes(b"x/1.jpg caf\xe9\n")
    with pytest.raises(DataError, match=r"labels .*: byte 11 is not UTF-8"):
        build_index(str(tmp_path / "x.tar"), f"file:{tmp_path / 'labels.txt'}", progress=False)


@pytest.mark.parametrize("letter", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\t", "\x1b"])
def test_class_names_with_odd_characters_are_refused(tmp_path: Path, letter: str) -> None:
    """`str.splitlines` breaks at most of them: validation packed later had another number for every class behind it."""
    for name in ("a", f"b{letter}x", "c"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / f"{name[0]}.jpg").write_bytes(jpeg(1))
    with pytest.raises(DataError, match=r"class name 'b.*has the (control|line-breaking) character"):
        pack(str(tmp_path / "src"), tmp_path / "out", progress=False, workers=1)
    assert not list(tmp_path.glob("out/*.tar")) and not (tmp_path / "out" / "classes.txt").exists()
    with pytest.raises(DataError, match="character"):
        write_tar(tmp_path / "x.tar", {f"b{letter}x/1.jpg": jpeg(1), "c/2.jpg": jpeg(2)})
        build_index(str(tmp_path / "x.tar"), "key", progress=False)


def test_a_class_folder_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/src/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/1.jpg", "wb") as file:
        file.write(jpeg(1))
    (tmp_path / "src" / "b").mkdir()
    (tmp_path / "src" / "b" / "2.jpg").write_bytes(jpeg(2))
    with pytest.raises(DataError, match="undecodable character"):
        pack(str(tmp_path / "src"), tmp_path / "out", progress=False, workers=1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"0\n1\n0\n3\n", r"lines 1 and 3 are both '0'"),
        (b"0\n\n2\n3\n", r"line 2 is empty"),
        (b"0\nb\x0cx\n2\n3\n", r"line 2: class name 'b\\x0cx'"),
        (b"0\ncaf\xe9\n2\n3\n", r"byte 5 is not UTF-8"),
        (b"", r"line 1 is empty"),
    ],
)
def test_a_bad_classes_txt_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    pattern = write_shards(tmp_path, [8])
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"classes.txt.*{reason}"):
        build_index(pattern, progress=False)
    with pytest.raises(DataError, match=rf"classes.txt.*{reason}"):
        pack("sklearn:digits", tmp_path, name="other", progress=False, workers=1)


def test_lines_of_windows_are_read(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [8])
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\ncat\r\ndog\r\n")
    assert build_index(pattern, progress=False).classes == ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>\n<body>\nnot here\n</body>\n</html>\n", r"http://.*/classes.txt: the server sent a page b'<html>"),
        (b"\n <!DOCTYPE html>\n", r"sent a page"),
        (b"a\n" * (9 << 20), r"has more than 16777216 bytes"),
    ],
)
def test_a_page_instead_of_classes_txt_is_refused(tmp_path: Path, body: bytes, reason: str) -> None:
    write_shards(tmp_path / "www", [8])
    (tmp_path / "www" / "classes.txt").write_bytes(body)
    with serving(tmp_path / "www") as web, pytest.raises(DataError, match=reason):
        build_index(f"{web.url}/train-0000.tar", progress=False, folder=str(tmp_path), cache=Cache(tmp_path / "cache", 1 << 30))


@pytest.mark.parametrize("labels", ["cls", "json:label"])
def test_a_long_label_takes_no_memory(tmp_path: Path, labels: str) -> None:
    """One of 1 MiB among 3,000 made every one as wide: 11.7 GiB."""
    files = {}
    for number in range(20):
        text = "a" * (1 << 20) if number == 7 else "cat"
        files |= {
            f"k{number}.jpg": jpeg(0),
            f"k{number}.cls": text.encode(),
            f"k{number}.json": f'{{"label": "{text}"}}'.encode(),
        }
    write_tar(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=r"key 'k7'.*(1048576 bytes|1048576 characters), must be"):
        build_index(str(tmp_path / "x.tar"), labels, progress=False)
    (tmp_path / "y.tar").write_bytes((tmp_path / "x.tar").read_bytes())
    write_tar(tmp_path / "y.tar", {"k.jpg": jpeg(0), "k.json": b'{"label":' + b"[" * 100_000})
    with pytest.raises(DataError, match=r"has no field 'label'"):
        build_index(str(tmp_path / "y.tar"), "json:label", progress=False)
