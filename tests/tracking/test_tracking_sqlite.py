"""On the sqlite default: everything arrives once, in the same run after a resume; a killed training is finished by its shipper."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.journals import lines, write
from tests.support.mlflow_runs import client, expected, fields, followed, rows, slow_server, start_line, until
from tests.support.mlflow_runs import surroundings as surroundings
from trainer.analysis.comparison.groups import NothingToCompare, compare, from_mlflow
from trainer.analysis.comparison.page import warnings
from trainer.analysis.mlflow_pages import page_of_run
from trainer.journal.reader import read
from trainer.journal.writer import Journal
from trainer.tracking import sync
from trainer.tracking.state import SyncState
from trainer.tracking.upload import FIRST

pytestmark = [slow_server, pytest.mark.dist]


def test_sqlite_default_has_everything_once(default_run: Path):
    uri = f"sqlite:///{default_run.parent}/mlflow.db"
    assert page_of_run(default_run).startswith(f"mlflow ui --backend-store-uri {uri}")
    found = rows(uri, default_run)
    assert found == expected(default_run)
    assert {
        ("basic/loss", 20),
        ("basic/top1", 30),
        ("basic/top1_ema", 30),
        ("debug/plan/tokens/03", 20),
        ("run/device_hours", 30),
        ("system/node-a/cpu_utilization_percentage", 30),
        ("system/node-b.cluster/cpu_utilization_percentage", 30),
    } <= set(found)
    assert not any("ranks" in key or "per_class" in key for key, _ in found)
    mlflow, state = client(uri), SyncState.load(default_run)
    run = mlflow.get_run(state.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "tri" and state.trouble == ""
    assert run.data.params["optim.lr"] == "0.001" and run.data.tags["commit"] == "c0ffee"
    assert "84.38 %" in run.data.tags["mlflow.note.content"]
    contexts = {tag.value: data.dataset.digest for data in run.inputs.dataset_inputs for tag in data.tags}
    assert contexts == {"training": "train-abc", "validation": "validation-abc"}
    files = {file.path for file in mlflow.list_artifacts(state.run_id)}
    assert files == {*FIRST, "report.md", "report.png", "journal.jsonl", "traces"}
    assert [file.path for file in mlflow.list_artifacts(state.run_id, "traces")] == ["traces/steps-1-2.rank-0.json.gz"]
    assert (default_run.parent / "mlflow-artifacts").is_dir()
    (times,) = {m.timestamp for m in mlflow.get_metric_history(state.run_id, "basic/loss") if m.step == 30}
    assert times == int([line["time"] for line in read(default_run) if line["kind"] == "step"][-1] * 1000)


def test_compare_reads_an_experiment_here_or_from_mlflow(default_run: Path, tmp_path: Path):
    uri = f"sqlite:///{default_run.parent}/mlflow.db"
    assert from_mlflow("trilevel", tmp_path, uri) == ([default_run], [])
    state = (default_run / "mlflow.json").read_text()
    (default_run / "mlflow.json").write_text(state.replace(SyncState.load(default_run).run_id, "0" * 32))
    try:  # the folder is another run's by now
        (here,), _ = from_mlflow("trilevel", tmp_path / "other", uri)
        assert here.parent == tmp_path / "other"
    finally:
        (default_run / "mlflow.json").write_text(state)
    away = default_run.rename(default_run.parent / "away")  # as on another machine
    try:
        (here,), _ = from_mlflow("trilevel", tmp_path, uri)
        assert here.parent == tmp_path and list(read(here)) == list(read(away))
        assert [group.name for group in compare([here]).groups] == ["tri"]
    finally:
        away.rename(default_run)


def test_experiments_that_cannot_be_read_are_refused_and_nothing_is_made(default_run: Path, tmp_path: Path):
    shutil.copy(default_run.parent / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(NothingToCompare, match=r"'other': not at sqlite.*valid values: Default, trilevel"):
        from_mlflow("other", tmp_path, uri)
    mlflow = client(uri)
    mlflow.create_run(mlflow.get_experiment_by_name("trilevel").experiment_id, run_name="young")
    assert from_mlflow("trilevel", tmp_path / "out", uri)[1] == ["young"]
    output = warnings(compare([default_run], missing=["young"]))
    assert output == ["left out, without a journal in MLflow: young; upload it with trilevel sync RUN"]
    with pytest.raises(NothingToCompare, match="no such database"):
        from_mlflow("trilevel", tmp_path, f"sqlite:///{tmp_path}/elsewhere/mlflow.db")
    assert not (tmp_path / "elsewhere").exists()
    began = time.monotonic()
    with pytest.raises(NothingToCompare, match="give run directories"):
        from_mlflow("trilevel", tmp_path, "http://127.0.0.1:9")
    assert time.monotonic() - began < 10  # MLflow's own retries: four minutes


def test_a_resume_continues_the_same_run_with_nothing_twice(default_run: Path, tmp_path: Path):
    """Killed behind step 20, gone on from 10 with another learning rate; the shipper of the first attempt is killed as well."""
    directory = shutil.copytree(default_run, tmp_path / "runs" / "tri")
    shutil.copy(default_run.parent / "mlflow.db", tmp_path / "runs" / "mlflow.db")
    for name in ("journal.jsonl", "mlflow.json"):
        (directory / name).unlink()
    uri, whole = f"sqlite:///{tmp_path}/runs/mlflow.db", list(lines())
    first = [line for line in whole if 0 < line.get("step", 0) <= 20 and line["kind"] != "start"]
    write(directory, [whole[0] | start_line() | {"time": whole[0]["time"]}, *first])

    assert sync.sync(directory).done
    state = SyncState.load(directory)
    assert client(uri).get_run(state.run_id).info.status == "KILLED"  # it has been silent for years
    state.offset, state.last = 0, {}  # as if the shipper had been killed before it noted what had arrived
    state.save(directory)

    again = [line for line in whole if line["kind"] not in ("start", "epoch") and line.get("step", 0) > 10]
    with Journal(directory) as journal:
        journal.write("start", **start_line(optim={"lr": 5e-4, "name": "adamw"}))
        journal.write("resume", epoch=1, batch=0, step=10)
        for line in again:  # the times and the rates differ, as they would
            journal.write(line["kind"], **fields(line))
    assert sync.sync(directory).done
    found = rows(uri, directory)
    assert found == expected(directory)
    assert ("basic/loss", 30) in found and {len(values) for values in found.values()} == {1}
    run = client(uri).get_run(state.run_id)
    assert SyncState.load(directory).run_id == state.run_id and run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001" and run.data.tags["param_drift.optim.lr"] == "attempt 1: 0.001 -> 0.0005"
    assert run.data.tags["attempts"] == "2"


def test_training_killed_the_shipper_brings_the_rest_and_ends(default_run: Path, tmp_path: Path):
    directory = tmp_path / "runs" / "tri"
    directory.mkdir(parents=True)
    shutil.copy(default_run.parent / "mlflow.db", tmp_path / "runs" / "mlflow.db")
    trainer = followed(directory)
    assert trainer.stdout
    shipper = psutil.Process(int(trainer.stdout.readline()))
    until(lambda: SyncState.load(directory).last, 30, directory)
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler ends a job by signals to all of its processes
        shipper.send_signal(number)
    done, message = sync.sync(directory)
    assert not done and "another process is uploading" in message
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert psutil.wait_procs([shipper], timeout=20)[0]
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert rows(uri, directory) == expected(directory)
    assert client(uri).get_run(SyncState.load(directory).run_id).info.status == "KILLED"


def test_a_deleted_run_is_reported_and_a_refused_metric_delays_nothing(
    default_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = tmp_path / "runs" / "other"
    directory.parent.mkdir()
    shutil.copy(default_run.parent / "mlflow.db", tmp_path / "runs" / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    write(directory, lines(epochs=1, sparse=False))
    monkeypatch.setattr("trainer.tracking.metrics._key", lambda name: name.replace("/loss", "/loss!"))
    assert sync.sync(directory).done
    assert SyncState.load(directory).refused == 5 + 2  # train/loss at five log steps, eval/loss of both
    assert ("basic/lr", 10) in rows(uri, directory) and ("debug/loss!", 10) not in rows(uri, directory)
    client(uri).delete_run(SyncState.load(directory).run_id)
    write(directory, [{"kind": "step", "time": 1.8e9, "attempt": 0, "step": 11, "lr": 1.0}])
    done, message = sync.sync(directory)
    assert not done and "was deleted in MLflow: delete mlflow.json" in message
