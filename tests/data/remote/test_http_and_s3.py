"""Shards behind http and s3 give what the same files give, whatever the server does on the way; what can't be is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.http_server import Web, serving
from tests.support.images import config, jpeg, write_shards, write_tar
from trainer import __main__ as trilevel
from trainer.data.errors import DataError, StorageUnavailable
from trainer.data.loader import prefetch
from trainer.data.loader.build import training_stream, validation_set
from trainer.data.remote import client, retry, sessions
from trainer.data.remote.cache import Cache
from trainer.data.shards.index import Index, build_index, open_index
from trainer.data.shards.pattern import expand
from trainer.data.shards.reader import Reader

SIZES = [5, 1, 7]
CACHE_SIZE = 1 << 30


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "home"))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    write_shards(tmp_path / "www", SIZES)
    with serving(tmp_path / "www") as server:
        yield server


def braces(web: Web) -> str:
    return f"{web.url}/train-{{0000..0002}}.tar"


def same(index: Index, local: Index) -> None:
    """Two indexes of the same shards are equal, and their examples have the same bytes."""
    assert index.names == local.names and index.fingerprint == local.fingerprint and index.classes == local.classes
    for field in ("offset", "length", "labels", "sizes"):
        assert (getattr(index, field) == getattr(local, field)).all()
    assert [index.key(i) for i in range(len(index))] == [local.key(i) for i in range(len(local))]
    ids = np.arange(len(local))
    assert [bytes(d) for d in Reader(index).read(ids)] == [bytes(d) for d in Reader(local).read(ids)]  # pyright: ignore


@pytest.mark.parametrize("ranges", [True, False])
def test_http_with_faults_is_the_same_as_files(tmp_path: Path, ranges: bool) -> None:
    pattern = write_shards(tmp_path / "www", SIZES)
    with serving(tmp_path / "www", latency=0.03, ranges=ranges) as web:
        web.faults = {"train-0000.tar": [503, "cut", "cut", 500], "train-0001.tar": ["slow"], "train-0002.tar": ["cut", 429]}
        index = build_index(braces(web), progress=False)
        assert index.is_remote() and index.root == web.url and index.path.parent == tmp_path / "home" / "index"
        assert not any(web.faults.values()), "all faults were met"
        same(index, build_index(pattern, progress=False))
        assert web.gets["train-0001.tar"] == 1, "what was indexed is in the cache"
        again = open_index(braces(web))
        assert pickle.loads(pickle.dumps(again)).source(1) == index.source(1)
        open_index(braces(web), verify=None)
        assert web.heads["train-0001.tar"] == 2, "one when indexed, one when opened, none by the other ranks of a node"
        open_index(braces(web), verify="full")
        assert web.gets["train-0001.tar"] == 2


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3 server of our own; the environment names it, as a user would."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        sessions._clients.clear()
        yield sessions.s3()
        sessions._clients.clear()
    server.stop()


def test_s3_is_the_same_as_files(tmp_path: Path, s3: Any) -> None:
    pattern = write_shards(tmp_path / "shards", SIZES)
    s3.create_bucket(Bucket="images")
    for path in (tmp_path / "shards").iterdir():
        s3.upload_file(str(path), "images", f"in1k/{path.name}")
    s3.put_object(Bucket="images", Key="in1k/deeper/train-0009.tar", Body=b"")
    s3.put_object(Bucket="images", Key="in1k/classes.txt", Body=b"0\n1\n2\n3\n4\n")
    (tmp_path / "shards" / "classes.txt").write_text("0\n1\n2\n3\n4\n")
    local = build_index(pattern, progress=False)
    assert len(local.classes) == 5
    for wanted in ("train-*.tar", "train-{0000..0002}.tar", "train-000[0-9].tar", ""):
        same(build_index(f"s3://images/in1k/{wanted}", progress=False), local)
        assert len(open_index(f"s3://images/in1k/{wanted}")) == 13
    s3.put_object(Bucket="images", Key="in1k/train-0001.tar", Body=(tmp_path / "shards" / "train-0001.tar").read_bytes())
    open_index("s3://images/in1k/train-*.tar")  # written again, but the same
    s3.put_object(Bucket="images", Key="in1k/train-0001.tar", Body=b"x" * local.shards[1]["bytes"])
    with pytest.raises(DataError, match=r"s3://images/in1k/train-0001.tar changed since"):
        open_index("s3://images/in1k/train-*.tar")
    s3.delete_object(Bucket="images", Key="in1k/train-0001.tar")
    with pytest.raises(DataError, match=r"in1k/train-0001.tar is in the index .* missing"):
        open_index("s3://images/in1k/train-*.tar")
    with pytest.raises(DataError, match=r"s3://images/in1k/train-0001.tar: HTTP status 404"):
        build_index("s3://images/in1k/train-{0000..0002}.tar", progress=False)
    with pytest.raises(DataError, match=r"s3://images/none-\*.tar.*no object matches"):
        expand("s3://images/none-*.tar")


def test_s3_without_boto3_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_clients", {})
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(DataError, match=r"pip install 'trilevel\[s3\]'"):
        expand("s3://images/")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_through_a_small_cache_are_those_of_files(tmp_path: Path, workers: int) -> None:
    pattern = write_shards(tmp_path / "www", [6] * 12)
    local = build_index(pattern, progress=False)
    limit = sum(s["bytes"] for s in local.shards) * 0.6
    cache = {"cache": str(tmp_path / "cache"), "cache_size": limit / 2**30, "workers": workers, "window": 6, "lanes": 1}
    with serving(tmp_path / "www", latency=0.03) as web:
        index = build_index(f"{web.url}/train-{{0000..0011}}.tar", cache=Cache(tmp_path / "once", int(limit)), progress=False)
        web.faults = {"train-0004.tar": [500, "cut"], "train-0007.tar": ["garbled", "cut"]}
        plain = config("x", data={"window": 6, "lanes": 1})
        through = training_stream(index, config("x", data=cache), 0, 1)
        from_files = training_stream(local, config("x", data=cache | {"cache": str(tmp_path / "other")}), 0, 1)
        for epoch in range(2):
            wanted = list(training_stream(local, plain, 0, 1).epoch(epoch, None))
            for stream in (through, from_files):
                got = list(stream.epoch(epoch, None))
                assert not any(b.broken for b in got) and len(got) == len(wanted) == 6
                assert all((a.images == b.images).all() and (a.ids == b.ids).all() for a, b in zip(got, wanted, strict=True))
        for folder in ("cache", "other"):
            held = list((tmp_path / folder / "trilevel-cache-1").glob("*.tar"))
            assert 0 < sum(p.stat().st_size for p in held) <= limit and len(held) < 12
        got = list(validation_set(index, config("x", data=cache), 1, 2))
        assert [i for b in got for i in b.ids.tolist() if i >= 0] == list(range(36, 72)) and not any(b.broken for b in got)


def test_a_changed_or_lost_shard(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_index(braces(web), cache=Cache(tmp_path / "a", CACHE_SIZE), progress=False)
    path = tmp_path / "www" / "train-0002.tar"
    original = path.read_bytes()
    path.write_bytes(original[:600] + b"!" + original[601:])
    with pytest.raises(DataError, match=r"train-0002.tar changed since it was indexed"):
        open_index(braces(web))
    got = Reader(index, Cache(tmp_path / "b", CACHE_SIZE)).read(np.arange(13))
    assert [isinstance(g, DataError) for g in got] == [False] * 6 + [True] * 7 and "hash mismatch in 3 downloads" in str(got[6])
    assert not list((tmp_path / "b").rglob("*.part"))
    path.write_bytes(original + b"\0" * 512)
    with pytest.raises(DataError, match=r"train-0002.tar changed: \d+ bytes, \d+ in the index"):
        open_index(braces(web))
    path.unlink()
    with pytest.raises(DataError, match=r"train-0002.tar: HTTP status 404"):
        open_index(braces(web))
    with pytest.raises(DataError, match=r"index .* not found; .*trilevel index"):
        open_index(f"{web.url}/else/train-{{0..1}}.tar")
    monkeypatch.setattr(retry, "_TRIES", 3)
    web.faults = {"train-0000.tar": [500] * 9}
    with pytest.raises(DataError, match=r"train-0000.tar: HTTP status 500 .*after 3 attempts"):
        Cache(tmp_path / "c", CACHE_SIZE).fetch(index.source(0))
    with pytest.raises(DataError, match=r"Connection refused.*after 3 attempts"):
        client.stat("http://127.0.0.1:9/train.tar")


def test_a_shard_that_cannot_be_fetched_is_requested_once_per_read(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many runs of images a batch wants of it: every one would wait out all retries."""
    index = build_index(f"{web.url}/train-0000.tar", progress=False, folder=str(tmp_path), cache=Cache(tmp_path / "a", 1 << 30))
    reader, asked = Reader(index, Cache(tmp_path / "b", 1 << 30)), []
    monkeypatch.setattr("trainer.data.shards.reader._GAP", -1)  # every image is a run of its own

    def gone(source: Any) -> int:
        asked.append(source)
        raise DataError("the server is gone")

    monkeypatch.setattr(Cache, "open", lambda _, source: gone(source))
    found = reader.read(np.arange(len(index)))
    assert len(asked) == 1 and all("the server is gone" in str(one) for one in found) and len(found) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_stays_away_ends_the_run_by_its_name(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """No image is the cause: none is counted as broken, and the error of a worker is shown without its stack. The fetch process, whose
    lock on a shard a reader waits for, tries as often as this process: twice."""
    fetch = "from trainer.data.remote import fetch_process, retry; retry._TRIES = 2; fetch_process.main()"

    def popen(words: list[str], **more: Any) -> subprocess.Popen[str]:
        assert words[1:3] == ["-m", "trainer.data.remote.fetch_process"]
        return subprocess.Popen([words[0], "-c", fetch, *words[3:]], **more)

    monkeypatch.setattr(prefetch, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
    index = build_index(braces(web), progress=False, folder=str(tmp_path), cache=Cache(tmp_path / "a", CACHE_SIZE))
    monkeypatch.setattr(retry, "_TRIES", 2)
    web.faults = {name: [503] * 99 for name in index.names}
    settings = config("x", data={"cache": str(tmp_path / "b"), "cache_size": 0.1, "workers": workers, "batch": 4, "window": 4})
    for batches in (training_stream(index, settings, 0, 1).epoch(0, None), iter(validation_set(index, settings, 0, 1))):
        with pytest.raises(
            StorageUnavailable, match=r"train-000\d.tar: HTTP status 503 .*after 2 attempts.*check that the server is up"
        ) as error:
            next(batches)
        assert "Traceback" not in str(error.value)


def test_a_cache_that_can_not_be_written_ends_the_run_by_its_name(web: Web, tmp_path: Path) -> None:
    index = build_index(braces(web), progress=False, folder=str(tmp_path), cache=Cache(tmp_path / "a", CACHE_SIZE))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageUnavailable, match=r"data.cache=.*file: Not a directory .*; use a folder"):
        Reader(index, Cache(tmp_path / "file", CACHE_SIZE)).read(np.arange(13))


def test_errors_inside_a_remote_shard_name_its_url(web: Web, tmp_path: Path) -> None:
    data = (tmp_path / "www" / "train-0001.tar").read_bytes()
    (tmp_path / "www" / "train-0001.tar").write_bytes(data[:1000])
    with pytest.raises(DataError, match=rf"shard {web.url}/train-0001.tar: truncated"):
        build_index(braces(web), progress=False)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("https://me:word@host/train-{0..3}.tar", r"'https://host/train-\{0..3\}.tar'.*user or password.*NETRC"),
        ("s3://key:secret@bucket/x.tar", "user or password"),
        ("http://host/train-*.tar", "no listing.*braces"),
        ("https://host/x.tar?X-Amz-Signature=abc", "queries"),
        ("ftp://host/x.tar", "unsupported scheme ftp://"),
        ("pipe:cat x.tar", "would run 'cat x.tar' in a shell.*--allow-pipe"),
    ],
)
def test_refused_patterns(pattern: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        expand(pattern)
    assert "word" not in str(error.value).replace("password", "") and "abc" not in str(error.value)


def test_http_credentials_come_from_netrc(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    request = sessions.web().prepare_request(__import__("requests").Request("GET", f"{web.url}/train-0000.tar"))
    assert request.headers["Authorization"].startswith("Basic ")


def test_pipes_where_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_ALLOW_PIPE", "1")
    pattern = write_shards(tmp_path / "shards", SIZES)
    pipe = f"pipe:cat {tmp_path}/shards/train-{{0000..0002}}.tar"
    index = build_index(pipe, progress=False)
    local = build_index(pattern, progress=False)
    assert index.sizes.tolist() == SIZES and (index.labels == local.labels).all()
    assert len(open_index(pipe, verify="full")) == 13
    reader = Reader(index, Cache(tmp_path / "fresh", CACHE_SIZE))
    assert [bytes(d) for d in reader.read(np.arange(13))] == [jpeg(i) for i in range(13)]  # pyright: ignore
    with pytest.raises(DataError, match=r"exit"):
        build_index("pipe:echo no; exit 3", progress=False)


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickled_members_are_never_decoded(tmp_path: Path) -> None:
    """webdataset unpickles .pyd and .pickle members on its own."""
    trap = pickle.dumps(Trap(str(tmp_path / "sprung")))
    members = {"a.jpg": jpeg(0), "a.cls": b"0", "a.pyd": trap, "a.pickle": trap, "a.pkl": trap, "a.pth": trap}
    (tmp_path / "www").mkdir()
    write_tar(tmp_path / "www" / "a.tar", members)
    with serving(tmp_path / "www") as web:
        index = build_index(f"{web.url}/a.tar", progress=False)
        assert bytes(Reader(index).read(np.arange(1))[0]) == jpeg(0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(DataError, match=r"no \.json"):
            build_index(f"{web.url}/a.tar", "json:label", progress=False)
    assert not (tmp_path / "sprung").exists()


def test_command_line(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--index", str(tmp_path / "indexes"), "--cache", str(tmp_path / "c"), "--cache-size", "0.01"]
    assert trilevel.main(["index", braces(web), *where]) == 0
    assert trilevel.main(["verify", braces(web), "--workers", "1", *where]) == 0
    assert "13 images" in capsys.readouterr().out and len(list((tmp_path / "indexes").glob("train-*.index"))) == 1
    assert not (tmp_path / "home").exists()
    local = str(tmp_path / "www" / "train-*.tar")
    assert trilevel.main(["index", local, *where[:2]]) == 0, "shards on a file system that can't be written to"
    assert not list((tmp_path / "www").glob("*.index"))
    same(open_index(local, folder=str(tmp_path / "indexes")), open_index(braces(web), folder=str(tmp_path / "indexes")))
    assert trilevel.main(["index", f"{web.url}/none.tar"]) == 2
    assert "none.tar: HTTP status 404" in capsys.readouterr().err
