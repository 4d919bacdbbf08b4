"""Servers with false answers: nothing is written outside the folder asked for, and no more than allowed is taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.analysis.comparison.groups import NothingToCompare, from_mlflow
from trainer.data.errors import DataError
from trainer.data.remote.cache import Cache
from trainer.data.remote.client import RemoteStat


@pytest.mark.parametrize("run_id", ["../../../escaped", "/abs/dir", "", ".", "a/b", "a\n", "-x", "a" * 300])
def test_a_run_id_of_mlflow_is_not_used_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_id: str) -> None:
    if run_id.startswith("/"):
        run_id = f"{tmp_path}{run_id}"

    class Client:
        def __init__(self, tracking_uri: str) -> None: ...

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="1")

        def search_runs(self, *_: Any, **__: Any) -> Any:
            run = SimpleNamespace(info=SimpleNamespace(run_id=run_id, run_name="x"), data=SimpleNamespace(tags={}))
            return type("Page", (list,), {"token": None})([run])

        def download_artifacts(self, _: str, name: str, folder: str) -> None:
            Path(folder, name).write_text('{"kind": "start"}')

    monkeypatch.setattr("mlflow.tracking.MlflowClient", Client)
    into = tmp_path / "out" / "deep" / "runs"
    with pytest.raises(NothingToCompare, match=r"run id .* not a name"):
        from_mlflow("e", into, "http://127.0.0.1:9")
    assert not list(tmp_path.rglob("journal.jsonl"))


def test_a_body_of_unknown_size_stays_inside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless(_url: str, _size: int | None) -> Iterator[bytes]:
        nonlocal taken
        while taken < 64 << 20:
            taken += 1 << 20
            yield bytes(1 << 20)

    monkeypatch.setattr("trainer.data.remote.cache.stream", endless)
    monkeypatch.setattr("trainer.data.remote.cache.stat", lambda _: RemoteStat(None, ""))
    monkeypatch.setattr("trainer.data.remote.cache._STEP", 1 << 20)
    with (
        pytest.raises(DataError, match=r"more than the cache limit of 4194304 bytes"),
        Cache(tmp_path, 4 << 20).import_shard("http://127.0.0.1:9/x.tar"),
    ):
        pass
    assert taken <= 6 << 20 and not list(tmp_path.rglob("*.part"))
