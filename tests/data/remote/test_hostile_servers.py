"""What a server may do wrong or on purpose: it is given up in time, named in a message without secrets, and bounded in size."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.conftest import environment, wait_for
from tests.support.fake_stores import send
from tests.support.http_server import Web, serving
from tests.support.images import jpeg, write_shards, write_tar
from trainer.data.errors import Changed, DataError, Forbidden, NotFound, StorageUnavailable
from trainer.data.remote import client, retry, sessions, stores
from trainer.data.remote.cache import Cache, Source
from trainer.data.shards import location
from trainer.data.shards.index import build_index
from trainer.data.shards.pattern import _num_names, expand
from trainer.data.shards.samples import fingerprint

NAME = "train-0000.tar"


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "home"))
    write_shards(tmp_path / "www", [40])
    with serving(tmp_path / "www") as server:
        yield server


def source(web: Web) -> Source:
    path = web.folder / NAME
    return Source(f"{web.url}/{NAME}", path.stat().st_size, fingerprint(path, whole=True))


@pytest.mark.parametrize("how", ["trickle", "headers"])
def test_a_trickling_server_is_given_up_in_time(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """A byte now and then keeps a socket's timeout from passing, in headers and body."""
    monkeypatch.setattr(client, "_SLOW", 1.0)
    monkeypatch.setattr(retry, "_TRIES", 2)
    web.faults = {NAME: [how] * 9}
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match=rf"{NAME}: less than 1048576 bytes in 1 s \(after 2 attempts\)"):
        Cache(tmp_path / "c", 1 << 30).fetch(source(web))
    assert time.monotonic() - began < 10
    assert f"warning: shard {web.url}/{NAME}: less than 1048576 bytes in 1 s; starting attempt 2 of 2" in capfd.readouterr().err
    assert not list((tmp_path / "c").rglob("*.part"))


def test_attempts_are_counted_anew_after_progress(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large shard over a bad line takes more than 10 connections; only attempts without progress count."""
    monkeypatch.setattr(retry, "_TRIES", 2)
    url, content = f"{web.url}/{NAME}", (web.folder / NAME).read_bytes()
    monkeypatch.setattr(client, "_PROGRESS", 1)
    web.faults = {NAME: ["cut"] * 5}
    assert b"".join(client.stream(url)) == content and web.gets[NAME] == 6
    monkeypatch.setattr(client, "_PROGRESS", len(content))
    web.faults = {NAME: ["cut"] * 5}
    with pytest.raises(StorageUnavailable, match=r"\(after 2 attempts\)"):
        b"".join(client.stream(url))


def test_a_trickling_server_is_taken_up_where_it_stopped(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SLOW", 1.0)
    web.faults = {NAME: ["trickle", "headers"]}
    Cache(tmp_path / "c", 1 << 30).fetch(source(web))
    assert web.gets[NAME] == 3


def test_ctrl_c_ends_index_under_a_trickling_server(web: Web) -> None:
    web.faults = {NAME: ["trickle"] * 9}
    command = [sys.executable, "-m", "trainer", "index", f"{web.url}/train-{{0000..0000}}.tar"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: web.gets[NAME], 120)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    finally:
        process.kill()


@pytest.mark.parametrize("if_range", [True, False], ids=["server knows If-Range", "server ignores If-Range"])
def test_a_shard_replaced_in_the_middle(web: Web, tmp_path: Path, if_range: bool) -> None:
    """The two halves are never put together; a shard that is as it was indexed is read again from its start."""
    path, known = web.folder / NAME, source(web)
    content = path.read_bytes()

    def replace(by: bytes) -> Callable[[BaseHTTPRequestHandler], bool]:
        def hook(handler: BaseHTTPRequestHandler) -> bool:
            if handler.headers.get("Range"):
                path.write_bytes(by)
                if not if_range:
                    del handler.headers["If-Range"]
            return False

        return hook

    web.hook, web.faults = replace(content[::-1]), {NAME: ["cut"]}
    with pytest.raises(Changed, match=rf"{NAME} was replaced on its server while it was read"):
        build_index(f"{web.url}/train-{{0000..0000}}.tar", progress=False)
    path.write_bytes(content)
    web.hook, web.faults = replace(content), {NAME: ["cut"]}
    Cache(tmp_path / "c", 1 << 30).fetch(known)
    path.write_bytes(content)
    web.hook, web.faults = replace(content[::-1]), {NAME: ["cut"]}
    with pytest.raises(DataError, match="hash mismatch in 3 downloads"):
        Cache(tmp_path / "d", 1 << 30).fetch(known)
    assert not list((tmp_path / "d").rglob("*.tar"))


@pytest.mark.parametrize("content_range", ["bytes 99999-199999/200000", "none", ""])
def test_another_range_than_the_requested_one(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content_range: str
) -> None:
    monkeypatch.setattr(retry, "_TRIES", 2)
    data = (web.folder / NAME).read_bytes()

    def hook(handler: BaseHTTPRequestHandler) -> bool:
        return bool(handler.headers.get("Range")) and send(handler, 206, data[5000:], Content_Range=content_range)

    web.hook, web.faults = hook, {NAME: ["cut"]}
    with pytest.raises(StorageUnavailable, match=r"requested bytes from \d+ on, got Content-Range"):
        Cache(tmp_path / "c", 1 << 30).fetch(source(web))


@pytest.mark.parametrize("length", ["abc", "-5", "1" * 30, "1" * 5000])
def test_a_size_that_is_not_a_number(web: Web, length: str) -> None:
    web.hook = lambda handler: handler.command == "HEAD" and send(handler, 200, Content_Length=length)
    with pytest.raises(DataError, match=rf"{NAME}: the server sent the size '{length[:30]}', not a number"):
        client.stat(f"{web.url}/{NAME}")


def test_bodies_of_unknown_size_stay_below_the_limits(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> bool:
        if handler.command == "HEAD":
            return send(handler, 405)
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        for _ in range(1000):
            handler.wfile.write(bytes(1 << 20))
            sent.append(1)
        return True

    web.hook = endless
    with pytest.raises(DataError, match=rf"{NAME} has more than the cache limit of 16777216 bytes; raise --cache-size"):
        build_index(f"{web.url}/train-{{0000..0000}}.tar", progress=False, cache=Cache(tmp_path / "c", 16 << 20))
    assert len(sent) < 40 and not list((tmp_path / "c").rglob("*.part"))
    monkeypatch.setattr(location, "LARGEST_FILE", 1000)
    with pytest.raises(DataError, match=r"classes.txt has more than 1000 bytes"):
        location.locate_shards(f"{web.url}/train-{{0000..0000}}.tar").classes()


def test_messages_show_no_signature_and_no_password(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_TRIES", 2)
    for where in ("http://127.0.0.1:9/x.tar?X-Amz-Signature=SECRET", "http://me:SECRET@127.0.0.1:9/x.tar"):
        web.hook = lambda handler, where=where: send(handler, 302, Location=where)
        with pytest.raises(StorageUnavailable, match="Connection refused") as error:
            client.stat(f"{web.url}/{NAME}")
        assert "SECRET" not in str(error.value)
    assert retry.without_secrets("for url 'https://a:b@h/x?sig=1&t=2' now") == "for url 'https://h/x?...' now"


@pytest.mark.parametrize(
    ("to", "reason"),
    [("file:///etc/passwd", "InvalidSchema"), ("http://127.0.0.1:99999/x", "InvalidURL"), ("", "TooManyRedirects")],
)
def test_redirects_to_nowhere_are_followed_once(web: Web, to: str, reason: str) -> None:
    web.hook = lambda handler: send(handler, 302, Location=to or handler.path)
    began = time.monotonic()
    with pytest.raises(DataError, match=reason):
        client.stat(f"{web.url}/{NAME}")
    assert time.monotonic() - began < 5


def test_compressed_bodies_are_refused(web: Web, tmp_path: Path) -> None:
    web.hook = lambda handler: handler.command == "GET" and send(handler, 200, bytes(100), Content_Encoding="gzip")
    with pytest.raises(DataError, match="Content-Encoding 'gzip'"):
        Cache(tmp_path / "c", 1 << 30).fetch(source(web))


@pytest.mark.parametrize("status", [301, 302])
def test_s3_redirects_are_refused(web: Web, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "tester")
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    web.hook = lambda handler: send(handler, status, Location="file:///etc/passwd")
    sessions._clients.clear()
    try:
        with pytest.raises(DataError, match=r"s3://bucket/x.tar: the server redirects every request; .*AWS_ENDPOINT_URL"):
            client.stat("s3://bucket/x.tar")
    finally:
        sessions._clients.clear()


def test_lists_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "pages", lambda *_: ([f"a-{n}.tar"] for n in itertools.count()))
    with pytest.raises(DataError, match=r"has more than 2001 names on 2001 pages; name the shards with braces"):
        client.listed("s3://bucket/a-*.tar")
    monkeypatch.setattr(stores, "pages", lambda *_: ([f"a-{n}.tar"] * 100_000 for n in itertools.count()))
    with pytest.raises(DataError, match=r"has more than 1100000 names"):
        client.listed("s3://bucket/a-*.tar")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("x-{0..999999999}.tar", "more than 1000000 shards"),
        ("http://host/x-{0..99999999999}.tar", "more than 1000000 shards"),
        ("s3://bucket/x-{0..%s}.tar" % ("9" * 5000), "more than 1000000 shards"),
        ("x-" + "{a,b}" * 200, "more than 1000000 shards"),
        ("x-{000..999}{0000..9999}.tar", "more than 1000000 shards"),
        ("x-{" + "{a,b}" * 200 + ",c}.tar", "more than 1000000 shards"),
        ("x-" + "{a..z}" * 9, "more than 1000000 shards"),
        ("x-{0..3.tar", "[Uu]nbalanced braces"),
        ("http://host/x-{0..3}}.tar", "[Uu]nbalanced braces"),
    ],
)
def test_braces_are_bounded_and_closed(pattern: str, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=reason):
        expand(pattern)
    assert time.monotonic() - began < 20


def test_braces_below_the_bound_are_expanded() -> None:
    pattern = "http://host/{train,val{a..c}}-{000..499..2}.tar"
    assert len(expand(pattern)[2]) == 1000
    assert _num_names(pattern) >= 1000 and _num_names("a{b,c}d{0..9}") == 20 and _num_names("a") == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, Forbidden),
        (403, Forbidden),
        (404, NotFound),
        (410, NotFound),
        (400, DataError),
        (405, DataError),
        (451, DataError),
    ],
)
def test_only_404_and_410_mean_that_a_file_does_not_exist(status: int, kind: type[DataError]) -> None:
    for url in ("http://host/x.tar", "s3://bucket/x.tar", "gs://bucket/x.tar", "hf://datasets/lab/photos/x.tar"):
        error = retry.refused(url, status, "why")
        assert type(error) is kind and str(error).startswith(f"shard {url}: HTTP status {status} why; ")
        asks = ("NETRC", "AWS credentials", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN")
        assert any(word in str(error) for word in asks) == (kind is Forbidden), error


@pytest.mark.parametrize(("status", "listed"), [(403, False), (401, False), (404, True), (410, True)])
def test_a_refused_classes_txt_is_not_a_missing_one(web: Web, status: int, listed: bool) -> None:
    """Classes in the order of their names instead of the file's would be numbered otherwise than in validation."""
    web.hook = lambda handler: handler.path.endswith("classes.txt") and send(handler, status)
    pattern = f"{web.url}/train-{{0000..0000}}.tar"
    assert build_index(pattern, progress=False).classes == ["0", "1", "2", "3"], "numbers need no file"
    named = {f"{name}.{end}": data for name in "ab" for end, data in (("jpg", jpeg(0)), ("cls", name.encode()))}
    write_tar(web.folder / NAME, named)
    if listed:
        assert build_index(pattern, progress=False).classes == ["a", "b"]
    else:
        with pytest.raises(DataError, match=rf"classes.txt: HTTP status {status} .*orders the classes.*allow listing"):
            build_index(pattern, progress=False)


def test_a_stream_that_is_dropped_leaves_its_connection(web: Web) -> None:
    """A reader that stops early (a size limit) does not keep the thread that reads ahead of it."""
    (web.folder / "long.tar").write_bytes(bytes(8 << 20))
    pieces = client.stream(f"{web.url}/long.tar")
    next(pieces)
    pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    wait_for(lambda: not web.running, 30)
    with pytest.raises(NotFound):
        client.read_all(f"{web.url}/none.tar", 10)
    assert os.getpid() in {process for _, process in sessions._clients}
