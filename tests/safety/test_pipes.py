"""Commands of `pipe:` shards run only where this command line allows it, never because a file does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.arguments import parse as launch_words
from launch.job import Job
from tests.support.images import config, write_shards
from trainer import __main__ as trilevel
from trainer.config.load import load
from trainer.data.errors import DataError
from trainer.data.loader.build import training_stream
from trainer.data.remote.cache import Cache
from trainer.data.remote.client import stream
from trainer.data.shards.index import open_index
from trainer.data.shards.reader import Reader


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "RAN"


@pytest.fixture
def pipe(tmp_path: Path, ran: Path) -> str:
    """A pattern whose command leaves a file, with an index in RUN/idx."""
    write_shards(tmp_path / "shards", [24])
    pattern = f"pipe:touch {ran}; cat {tmp_path}/shards/train-0000.tar"
    assert (
        trilevel.main(["index", pattern, "--allow-pipe", "--index", str(tmp_path / "run" / "idx"), "--cache", str(tmp_path)])
        == 0
    )
    assert ran.exists()
    ran.unlink()
    shutil.rmtree(tmp_path / "trilevel-cache-1", ignore_errors=True)
    return pattern


def write_run(run: Path, pattern: str, grant: object) -> Path:
    """A run directory as somebody else may send it."""
    about = {"index": str(run / "idx"), "cache": str(run / "cache"), "cache_size": 0.01, "verify": "full"}
    settings = config(pattern, data=about).resolved()
    settings["data"]["allow_pipe"] = grant
    settings["runs"], settings["name"] = str(run.parent), run.name
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "journal.jsonl").write_text(json.dumps({"kind": "message", "time": 1, "attempt": 0, "text": "x"}) + "\n")
    shutil.copy(run / "config.yaml", run.parent / "foreign.yaml")
    return run


COMMANDS = {
    "audit": ["audit", "RUN"],
    "replay": ["replay", "RUN", "--step", "1"],
    "kept": ["kept", "RUN"],
    "eval": ["eval", "timm:vit_tiny_patch16_224", "FOREIGN"],
    "check": ["train", "FOREIGN", "--check"],
    "resume": ["train", "FOREIGN", "--resume"],
    "bench": ["bench", "input", "FOREIGN"],
}


@pytest.mark.parametrize(
    ("name", "grant"), [*((name, True) for name in COMMANDS), ("audit", False), ("check", "yes"), ("check", 1)]
)
def test_a_file_allows_no_command(
    pipe: str, ran: Path, tmp_path: Path, name: str, grant: object, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", pipe, grant)
    words = [word.replace("RUN", str(run)).replace("FOREIGN", str(tmp_path / "foreign.yaml")) for word in COMMANDS[name]]
    assert trilevel.main(words) == 2
    assert not ran.exists()
    shown = capsys.readouterr().err
    assert f"touch {ran}; cat" in shown and "--allow-pipe" in shown and "TRILEVEL_ALLOW_PIPE=1" in shown


@pytest.mark.parametrize("how", ["--allow-pipe", "data.allow_pipe=true", "environment"])
def test_this_command_line_allows_it_once(
    pipe: str, ran: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", pipe, True)
    if how == "environment":
        monkeypatch.setenv("TRILEVEL_ALLOW_PIPE", "1")
    words = ["train", str(tmp_path / "foreign.yaml"), "--check", "name=another"]
    assert trilevel.main(words if how == "environment" else [*words, how]) == 0
    assert ran.exists()
    if how != "environment":
        assert "TRILEVEL_ALLOW_PIPE" not in os.environ
        ran.unlink()
        assert trilevel.main(words) == 2 and not ran.exists()


def test_a_run_does_not_keep_the_grant(pipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", pipe, True)
    monkeypatch.setenv("TRILEVEL_ALLOW_PIPE", "1")
    assert "allow_pipe" not in json.dumps(load(tmp_path / "foreign.yaml").resolved())


def test_no_other_way_leads_to_a_shell(ran: Path) -> None:
    """An index or a cache only names shards: the place where commands are started asks too."""
    with pytest.raises(DataError, match=r"would run 'touch .*--allow-pipe"):
        list(stream(f"pipe:touch {ran}"))
    assert not ran.exists()


def test_workers_and_the_fetching_process_get_the_grant(pipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_ALLOW_PIPE", "1")
    index = open_index(pipe, folder=str(tmp_path / "run" / "idx"))
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache"), "cache_size": 0.01, "workers": 1}
    batches = list(training_stream(index, config("x", data=settings), 0, 1).epoch(0, None))
    assert batches and not any(b.broken for b in batches)
    monkeypatch.delenv("TRILEVEL_ALLOW_PIPE")
    lost = Reader(index, Cache(tmp_path / "fresh", 1 << 30)).read(np.arange(2))
    assert all(isinstance(data, DataError) and "--allow-pipe" in str(data) for data in lost)


@pytest.mark.parametrize("words", [["local", "c.yaml"], ["slurm", "c.yaml"], ["sweep", "c.yaml"]])
def test_launchers_pass_it_on_as_an_argument(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_words(words).overrides == []
    given = launch_words([*words, "--allow-pipe", "optim.lr=1"])
    assert given.overrides == ["optim.lr=1", "data.allow_pipe=true"] and Job("c.yaml", tuple(given.overrides)).train()
    monkeypatch.setenv("TRILEVEL_ALLOW_PIPE", "1")
    assert launch_words(words).overrides == ["data.allow_pipe=true"]
