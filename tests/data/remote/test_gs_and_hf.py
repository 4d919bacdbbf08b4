"""Shards of Google Cloud Storage and of the Hugging Face Hub give what the same files give; tokens stay with their host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.remote.test_http_and_s3 import SIZES, same
from tests.support.fake_stores import google, hub, signed_only
from tests.support.http_server import Web, serving
from tests.support.images import write_shards
from trainer.data.errors import DataError
from trainer.data.remote import client, retry, sessions, stores
from trainer.data.shards.index import build_index, open_index
from trainer.data.shards.pattern import expand

HUB = "hf://datasets/lab/photos"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "home"))
    sessions._clients.clear()


@pytest.fixture
def gs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving(tmp_path / "gs") as web:
        web.hook = google(web)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", web.url.removeprefix("http://"))
        yield web


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The server behind the signed URLs; the Hub's own is named by the environment."""
    with serving(tmp_path / "hf") as web, serving(tmp_path / "hf") as cdn:
        web.hook, cdn.hook = hub(web, cdn, "hf_secret"), signed_only(cdn)
        monkeypatch.setenv("HF_ENDPOINT", web.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield cdn


def test_gs_with_faults_is_the_same_as_files(tmp_path: Path, gs: Web) -> None:
    pattern = write_shards(tmp_path / "gs" / "images" / "in 1k", SIZES)
    write_shards(tmp_path / "gs" / "images" / "in 1k" / "deeper", SIZES)
    local = build_index(pattern, progress=False, folder=str(tmp_path / "local"))
    gs.faults = {"train-0000.tar": [503, "cut", "cut"], "train-0002.tar": ["cut", 429]}
    for wanted in ("train-*.tar", "train-{0000..0002}.tar", "train-000[0-9].tar", ""):
        same(build_index(f"gs://images/in 1k/{wanted}", progress=False), local)
        assert len(open_index(f"gs://images/in 1k/{wanted}")) == sum(SIZES)
    assert not any(gs.faults.values()), "all faults were met"
    assert len(client.listed("gs://images/*/deeper/*.tar")) == 3
    (tmp_path / "gs/images/in 1k/train-0001.tar").unlink()
    with pytest.raises(DataError, match=r"gs://images/in 1k/train-0001.tar: HTTP status 404"):
        build_index("gs://images/in 1k/train-{0000..0002}.tar", progress=False)
    with pytest.raises(DataError, match=r"gs://none/\*.tar.*no object matches"):
        expand("gs://none/*.tar")


def test_names_of_gs_objects_are_quoted(tmp_path: Path, gs: Web) -> None:
    """In a URL `#` begins a fragment, and `%41` is an A."""
    for name in ("a#1.tar", "50%41.tar", "plain.tar"):
        (tmp_path / "gs" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "gs" / "images" / name).write_bytes(name.encode())
        assert b"".join(client.stream(f"gs://images/{name}")) == name.encode()


def test_gs_uses_the_credentials_of_google_auth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = pytest.importorskip("google.auth")
    credentials = pytest.importorskip("google.oauth2.credentials").Credentials("ya29.secret")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(auth, "default", lambda scopes: (credentials, None))
    write_shards(tmp_path / "gs" / "images", [1])
    seen: list[str] = []
    with serving(tmp_path / "gs") as web:
        web.hook = lambda handler: bool(seen.append(handler.headers["Authorization"]))
        monkeypatch.setattr(stores, "google_server", lambda: web.url)
        assert b"".join(client.stream("gs://images/train-0000.tar")) == (tmp_path / "gs/images/train-0000.tar").read_bytes()
    assert seen == ["Bearer ya29.secret"] * 2


def test_hf_with_faults_is_the_same_as_files(tmp_path: Path, hf: Web) -> None:
    pattern = write_shards(tmp_path / "hf" / "lab" / "photos" / "data", SIZES)
    (tmp_path / "hf/lab/photos/data/classes.txt").write_text("0\n1\n2\n3\n4\n")
    local = build_index(pattern, progress=False, folder=str(tmp_path / "local"))
    hf.faults = {"train-0000.tar": [503, "cut", "cut"], "train-0002.tar": ["cut", 429]}
    for wanted in ("train-*.tar", "train-{0000..0002}.tar", ""):
        same(build_index(f"{HUB}/data/{wanted}", progress=False), local)
    index = build_index(f"{HUB}@main/data/train-*.tar", progress=False)
    assert len(open_index(f"{HUB}@main/data/train-*.tar", verify="full")) == sum(SIZES) == len(index)
    assert not any(hf.faults.values()), "all faults were met"
    with pytest.raises(DataError, match=r"HTTP status 404"):
        build_index(f"{HUB}@v2/data/train-{{0000..0001}}.tar", progress=False)
    with pytest.raises(DataError, match=r"HTTP status 404"):
        expand(f"{HUB}/none/*.tar")


def test_hf_errors_show_neither_token_nor_signature(tmp_path: Path, hf: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "hf" / "lab" / "photos", [1])
    monkeypatch.setattr(retry, "_TRIES", 2)
    hf.faults = {"train-0000.tar": [500] * 9}
    with pytest.raises(DataError, match=r"HTTP status 500") as error:
        b"".join(client.stream(f"{HUB}/train-0000.tar"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DataError, match=r"HTTP status 401.*set HF_TOKEN") as other:
        client.stat(f"{HUB}/train-0000.tar")
    with pytest.raises(DataError, match=r"HTTP status 401.*set HF_TOKEN") as listing:
        expand(f"{HUB}/*.tar")
    assert not any(word in f"{error.value} {other.value} {listing.value}" for word in ("SECRET", "hf_"))


@pytest.mark.parametrize("url", ["hf://datasets/x.tar", "hf://lab/photos/x.tar", "hf://models/lab/photos/x.tar"])
def test_hf_urls_of_another_form_are_refused(url: str) -> None:
    with pytest.raises(DataError, match=r"hf://datasets/ORG/NAME\[@REVISION\]/PATH"):
        expand(url)
