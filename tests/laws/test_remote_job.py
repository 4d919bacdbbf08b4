"""The main job over shards behind a network: the same batches and the same losses as over files, whatever the servers do."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.test_refusals import RECIPE as DENSE
from tests.conftest import environment, lines, wait_for
from tests.support import images
from tests.support.http_server import serving
from trainer.__main__ import main
from trainer.data.remote import sessions
from trainer.data.remote.cache import Cache
from trainer.data.shards.index import build_index

pytestmark = pytest.mark.dist
RECIPE = DENSE.replace(
    "augment: {crop: shift, shift: 2, flip: 0.0}",
    "augment: {crop: rrc, flip: 0.5}\nexamples: {method: random_epoch, removed: 0.2}\nstop_at: 6step\ncontrol: 0\nevaluate: {every: 9ep}",
)


def braces(digits: Path, split: str) -> str:
    """All shards of a split, as a pattern that needs no listing."""
    return f"{split}-{{000000..{len(list(digits.glob(f'{split}-*.tar'))) - 1:06d}}}.tar"


def recipe(folder: Path, digits: Path, root: object) -> Path:
    """The recipe over the shards of `digits` as they are found below `root`, a folder or a URL."""
    text = RECIPE
    for split in ("validation", "train"):
        text = text.replace(f"DIGITS/{split}-*.tar", f"{root}/{braces(digits, split)}")
    (folder / "job.yaml").write_text(text)
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def local(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run over files, in this process."""
    folder = tmp_path_factory.mktemp("local")
    assert main(["train", str(recipe(folder, digits, digits)), f"runs={folder / 'runs'}"]) == 0
    return folder / "runs/job"


def same(run: Path, local: Path) -> None:
    """The same examples and draws in every batch, by the hash chain; the same losses; no image lost."""
    ours, theirs = lines(local, "step"), lines(run, "step")
    assert [(line["step"], line["chain"]) for line in theirs] == [(line["step"], line["chain"]) for line in ours]
    assert len(ours) == 6 and not lines(run, "broken")
    np.testing.assert_allclose([line["loss"] for line in theirs], [line["loss"] for line in ours], rtol=1e-4)


def test_two_processes_over_http_with_faults_train_as_over_files(
    local: Path, digits: Path, tmp_path: Path, trilevel: Callable[..., Any]
) -> None:
    with serving(digits, latency=0.03) as web:
        path, indexes = recipe(tmp_path, digits, web.url), str(tmp_path / "indexes")
        for split in ("train", "validation"):
            words = ["--index", indexes, "--cache", str(tmp_path / "once")]
            assert main(["index", f"{web.url}/{braces(digits, split)}", *words]) == 0
        web.gets.clear()
        web.faults = {
            "train-000000.tar": [500, "cut"],
            "train-000001.tar": ["slow"],
            "train-000002.tar": ["garbled", 503],
            "train-000003.tar": ["cut", "cut", 429],
        }
        trilevel(2, "train", str(path), f"data.index={indexes}", f"data.cache={tmp_path / 'cache'}", "data.cache_size=0.1")
        assert not any(web.faults.values()), "all faults were met"
        assert web.gets["train-000004.tar"] == 1, "once for both processes"
    same(tmp_path / "runs/job", local)


@pytest.mark.slow
def test_sigterm_ends_a_run_whose_server_trickles(digits: Path, tmp_path: Path) -> None:
    with serving(digits) as web:
        path, indexes = recipe(tmp_path, digits, web.url), str(tmp_path / "indexes")
        for split in ("train", "validation"):
            assert (
                main(["index", f"{web.url}/{braces(digits, split)}", "--index", indexes, "--cache", str(tmp_path / "once")])
                == 0
            )
        web.gets.clear()
        web.faults = {path.name: ["trickle"] * 9 for path in digits.glob("train-*.tar")}
        settings = [f"data.index={indexes}", f"data.cache={tmp_path / 'cache'}", "data.cache_size=0.1", "data.workers=1"]
        command = [sys.executable, "-m", "trainer", "train", str(path), f"runs={tmp_path / 'runs'}", *settings]
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            wait_for(lambda: web.gets, 200)
            time.sleep(5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 2
            assert process.stderr is not None and "no batch arrived within 20 s after" in process.stderr.read()
        finally:
            process.kill()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "tester")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    sessions._clients.clear()
    yield sessions.s3()
    sessions._clients.clear()
    server.stop()


@pytest.mark.slow  # reads over S3: tests/data/remote/test_http_and_s3.py
def test_over_s3_it_trains_as_over_files(
    local: Path, digits: Path, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "home"))
    s3.create_bucket(Bucket="digits")
    for path in digits.glob("*.tar"):
        s3.upload_file(str(path), "digits", f"all/{path.name}")
    path = recipe(tmp_path, digits, "s3://digits/all")
    for split in ("train", "validation"):
        assert main(["index", f"s3://digits/all/{braces(digits, split)}"]) == 0
    assert (
        main(
            [
                "train",
                str(path),
                f"runs={tmp_path / 'runs'}",
                "data.workers=1",
                f"data.cache={tmp_path}/cache",
                "data.cache_size=0.1",
            ]
        )
        == 0
    )
    assert list(Cache(tmp_path / "cache", 0).directory.glob("*.tar"))
    same(tmp_path / "runs/job", local)


def test_the_bench_serves_the_shards_of_a_configuration_and_measures_both_ways(tmp_path: Path, capsys: Any) -> None:
    build_index(images.write_shards(tmp_path / "drawn", [10] * 8), progress=False)
    path = tmp_path / "job.yaml"
    path.write_text(RECIPE.replace("DIGITS", str(tmp_path / "drawn")).replace("validation-*", "train-*"))
    words = [
        "--latency",
        "1",
        "--workers",
        "0",
        "--batch",
        "8",
        "--passes",
        "1",
        "--limit",
        "40",
        "--json",
        f"{tmp_path}/b.json",
    ]
    assert main(["bench", "remote", str(path), *words]) == 0
    message = capsys.readouterr().out
    assert "40 images in 4 shards" in message and "http / local: " in message and "s3 / local: " in message
    with pytest.raises(SystemExit):
        main(["bench", "remote"])
