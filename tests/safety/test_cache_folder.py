"""The cache deletes and writes only its own files, in a folder that it made and marked."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.images import jpeg, write_shards
from trainer import __main__ as trilevel
from trainer.data.errors import DataError
from trainer.data.remote.cache import Cache, Source
from trainer.data.remote.cache_check import CacheCheck
from trainer.data.shards.index import Index, build_index
from trainer.data.shards.reader import Reader

SIZES = [4] * 4


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as README suggests: shards/ with the shards, their index, and notes of the user."""
    pattern = write_shards(tmp_path / "shards", SIZES)
    (tmp_path / "shards" / "README.md").write_text("my notes")
    (tmp_path / "shards" / f"{'a' * 32}.part").write_text("named like a file of the cache")
    (tmp_path / "lock").write_text("the user's")
    build_index(pattern, progress=False)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_all(index: Index, cache: Cache) -> list[bytes]:
    return [bytes(data) for data in Reader(index, cache).read(np.arange(len(index)))]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shards_that_fit", [100.0, 1.5])
def test_a_cache_beside_the_shards_deletes_nothing(
    project: Path, shards_that_fit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(project)
    index = Index(project / "shards" / "train.index")
    cache = Cache(project, int(shards_that_fit * max(s["bytes"] for s in index.shards)))
    assert read_all(index, cache) == [jpeg(i) for i in range(16)]
    size = str(cache.size / 2**30)
    monkeypatch.chdir(project)
    assert trilevel.main(["verify", "shards/train-*.tar", "--cache", ".", "--cache-size", size, "--workers", "1"]) == 0
    assert {name: data for name, data in content(project).items() if name in before} == before


def test_other_files_in_the_folder_of_the_cache_stay(project: Path) -> None:
    index = Index(project / "shards" / "train.index")
    cache = Cache(project, max(s["bytes"] for s in index.shards))
    cache.fetch(index.source(0))
    mine = {"notes.tar": b"x" * 9999, "a.part": b"y", "ABCD.tar": b"z"}
    for name, data in mine.items():
        (cache.directory / name).write_bytes(data)
    (cache.directory / "inner").mkdir()
    cache.fetch(index.source(1))
    assert cache.holds(index.source(1)) and not cache.holds(index.source(0))
    assert {name: (cache.directory / name).read_bytes() for name in mine} == mine


def test_a_folder_that_the_cache_did_not_make_is_refused(project: Path) -> None:
    index = Index(project / "shards" / "train.index")
    cache = Cache(project / "other", 1 << 30)
    cache.directory.mkdir(parents=True)
    (cache.directory / f"{'b' * 32}.tar").write_text("not ours")
    for use in (lambda: cache.fetch(index.source(0)), lambda: cache.open(index.source(0)), cache.refuse_full_disk):
        with pytest.raises(DataError, match=r"data.cache=.*other.*CACHEDIR.TAG.*another folder"):
            use()
    assert os.listdir(cache.directory) == [f"{'b' * 32}.tar"]
    (cache.directory / f"{'b' * 32}.tar").unlink()
    cache.fetch(index.source(0))  # an empty folder is taken
    (cache.directory / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# of another program\n")
    with pytest.raises(DataError, match=r"CACHEDIR.TAG"):
        cache.fetch(index.source(1))


def test_a_cache_folder_that_holds_the_shards_is_refused(project: Path) -> None:
    index = Index(project / "shards" / "train.index")
    with pytest.raises(DataError, match=r"data.cache=.*shards: .*holds the shards"):
        Cache(project / "shards", 1 << 30).open(index.source(0))
    cache = Cache(project, 1 << 30)
    cache.fetch(index.source(0))
    inside = cache.directory / "mine.tar"
    inside.write_bytes(Path(index.source(1).url).read_bytes())
    with pytest.raises(DataError, match="holds the shards"):
        cache.open(Source(str(inside), *index.source(1)[1:]))


@pytest.mark.parametrize(
    ("name", "link"),
    [
        *itertools.product(["HASH.part", "HASH.tar", "lock", "CACHEDIR.TAG"], ["symlink", "hard link", "fifo"]),
        ("trilevel-cache-1", "symlink"),
    ],
)
def test_planted_links_are_not_followed(project: Path, tmp_path: Path, name: str, link: str) -> None:
    index = Index(project / "shards" / "train.index")
    source, cache = index.source(0), Cache(tmp_path / "cache", 1 << 30)
    precious = tmp_path / "precious"
    if name == "trilevel-cache-1":
        precious.mkdir()
        (precious / f"{'c' * 32}.part").write_text("thesis")
        place = cache.directory
        cache.folder.mkdir()
    else:
        precious.write_text("thesis")
        cache.fetch(index.source(1))  # makes and marks the folder
        place = cache.directory / name.replace("HASH", source.whole)
        place.unlink(missing_ok=True)
    before = content(tmp_path / "precious") if precious.is_dir() else precious.read_bytes()
    match link:
        case "symlink":
            place.symlink_to(precious)
        case "hard link":
            place.hardlink_to(precious)
        case _:
            os.mkfifo(place)
    try:
        os.close(cache.open(source))
    except DataError as error:
        assert "data.cache=" in str(error)
    assert (content(precious) if precious.is_dir() else precious.read_bytes()) == before


def test_a_cached_shard_is_hashed_at_its_first_use_by_a_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(project / "shards" / "train.index")
    earlier = Cache(project / "cache", 1 << 30)
    good = read_all(index, earlier)
    damaged = earlier.directory / f"{index.source(0).whole}.tar"
    data = bytearray(damaged.read_bytes())
    data[int(index.offset[0]) + 100] ^= 1  # one bit of the first image, the size is the same
    damaged.write_bytes(data)
    hour_ago = time.time() - 3600
    for path in earlier.directory.glob("*.tar"):
        os.utime(path, (hour_ago, hour_ago))
    run = Cache(project / "cache", 1 << 30)
    fetched: list[str] = []
    fetch = Cache.fetch
    monkeypatch.setattr(Cache, "fetch", lambda cache, source: fetched.append(source.url) or fetch(cache, source))
    assert not run.holds(index.source(0)) and not run.holds(index.source(1))  # the fetch process hashes them ahead
    assert read_all(index, run) == good
    assert fetched == [index.source(0).url]


def test_a_run_hashes_a_cached_shard_once_for_all_its_processes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(project / "shards" / "train.index")
    read_all(index, Cache(project / "cache", 1 << 30, CacheCheck(0.0)))
    hour_ago = time.time() - 3600
    hashed: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: hashed.append(at) or pread(file, size, at))
    start = CacheCheck().since
    for path in Cache(project / "cache", 1).directory.glob("*.tar"):
        os.utime(path, (hour_ago, hour_ago))
    for expected in (2 * len(SIZES), 0, 0):  # one piece and the end for each; then nothing
        hashed.clear()
        assert len(read_all(index, Cache(project / "cache", 1 << 30, CacheCheck(start)))) == sum(SIZES)
        assert len(hashed) == expected
    monkeypatch.setattr(os, "utime", lambda *args, **kw: (_ for _ in ()).throw(PermissionError()))  # a file of another user
    other = Cache(project / "cache", 1 << 30, CacheCheck(time.time() + 10))
    for expected in (2 * len(SIZES), 0):
        hashed.clear()
        read_all(index, other)
        assert len(hashed) == expected


def test_the_least_recently_used_goes_not_the_one_hashed_first(project: Path) -> None:
    index = Index(project / "shards" / "train.index")
    cache = Cache(project / "cache", 2 * max(s["bytes"] for s in index.shards))
    cache.fetch(index.source(0))
    cache.fetch(index.source(1))
    first, second = (cache.directory / f"{index.source(i).whole}.tar" for i in (0, 1))
    now = time.time()
    os.utime(first, (now, now - 9))  # used last
    os.utime(second, (now - 5, now))
    cache.fetch(index.source(2))
    assert first.exists() and not second.exists()
