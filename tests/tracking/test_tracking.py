"""What is sent to MLflow and when, without MLflow: metrics, parameters, tags; a shipper that fails anywhere loses and doubles nothing."""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.support.journals import START, lines, write
from tests.support.mlflow_runs import expected
from tests.support.mlflow_runs import surroundings as surroundings
from trainer.config.schema_run import TrackingConfig
from trainer.journal.file import JournalError
from trainer.tracking import sync
from trainer.tracking import upload as shipment
from trainer.tracking.metrics import Metric, metrics, param_changes, params, tags
from trainer.tracking.shipper import Shipper, start
from trainer.tracking.state import SyncState
from trainer.tracking.upload import JournalUploader


def test_what_one_looks_at_is_in_the_first_section():
    """MLflow's page has its sections in alphabetical order: eval/top1 stood behind checkpoint/* and control/*, 28 metrics were phases."""
    step = {"loss": 1.0, "lr": 1e-3, "images_per_second": 9.0, "data_wait": 0.1, "keep_tokens": 0.7, "grad_norm": 2.0}
    step |= {"spent": {"save": 1.0}}
    found = [m.key for m in metrics({"kind": "step", "time": 0, "step": 3} | step, 3)]
    found += [m.key for m in metrics({"kind": "eval", "time": 0, "top1": 0.5, "top5": 0.9, "seconds": 2.0}, 3)]
    basic = ["loss", "lr", "images_per_second", "data_wait", "keep_tokens"]
    assert found == [
        *(f"basic/{name}" for name in basic),
        "debug/grad_norm",
        "debug/spent/save",
        "basic/top1",
        "eval/top5",
        "debug/eval/seconds",
    ]
    assert metrics({"kind": "end", "time": 0, "spent": {"save": 1.0}}, 3) == []
    journal = {metric.key for line in lines() for metric in metrics(line, line.get("step", 0))}
    assert {key for key in journal if key.startswith("basic/")} == {
        f"basic/{name}" for name in (*basic, "keep_connections", "top1", "top1_ema")
    }
    assert sorted({key.partition("/")[0] for key in journal}) == ["basic", "debug", "eval", "eval_ema", "run"]


def test_every_number_of_a_line_becomes_a_metric_at_its_step():
    line = {"kind": "plateau", "time": 2.5, "attempt": 3, "step": 7, "epoch": 1, "progress": 1.0}
    line |= {
        "keep_tokens": 0.7,
        "tokens": [17, 12],
        "name": "text",
        "on": True,
        "facts": {"a b/%": 1, "ids": [4, 5]},
        "none": None,
    }
    found = {(m.key, m.value) for m in metrics(line, 7)}
    plan = {("keep_tokens", 0.7), ("tokens/00", 17), ("tokens/01", 12), ("facts/a b/_", 1)}
    assert found == {(f"debug/plan/{name}", value) for name, value in plan}
    assert {(m.time, m.step) for m in metrics(line, 7)} == {(2500, 7)}
    line = {"kind": "eval", "time": 0, "top1": 0.5, "ema": True, "per_class": [0.5, 0.5]}
    assert {m.key for m in metrics(line, 1)} == {"basic/top1_ema"}  # the classes are the journal's
    spread = {"min": 0.2, "median": 0.3, "max": 0.4, "slowest": 3, "slowest_host": "node-b"}
    line = {"kind": "step", "time": 0, "phases": {"forward": spread}}
    assert {m.key for m in metrics(line, 1)} == {"debug/phases/forward/median", "debug/phases/forward/max"}
    assert metrics({"kind": "epoch", "time": 0, "kept": 2, "examples": 4, "batch": 3}, 1) == []  # a resume inside the epoch
    assert ("debug/epoch/kept_share", 0.5) in {
        m[:2] for m in metrics({"kind": "epoch", "time": 0, "kept": 2, "examples": 4}, 1)
    }
    assert (
        metrics({"kind": "broken", "time": 0, "id": 4}, 1) == [] and metrics({"kind": "start", "time": 0, "world": 4}, 1) == []
    )


def test_long_values_are_cut_and_say_so():
    output = params({"model": {"args": {}, "name": "x" * 600}, "list": [1, 2]})
    assert output["model.args"] == "{}" and output["list"] == "[1, 2]"
    assert len(output["model.name"]) == 500 and output["model.name"].endswith("(cut, 600 characters; whole in config.yaml)")
    found = tags(START | {"attempt": 1})
    assert found["commit"] == found["mlflow.source.git.commit"] == "c0ffee" and found["version.torch"] == "2.15.0"
    assert found["pixels"] == "" and tags(START | {"pixels": ["short side 256"]})["pixels"] == "short side 256"
    assert found["who"] == "test" and found["attempts"] == "2" and found["hosts"] == "one" and "config" not in found


def test_drift_names_what_a_resume_changed():
    have = {"a": "1", "b": "2", "c": "3"}
    first = param_changes(have, {"a": "1", "b": "9"}, {}, 1)
    assert first == {"param_drift.b": "attempt 1: 2 -> 9", "param_drift.c": "attempt 1: 3 -> (absent)"}
    assert param_changes(have, {"a": "1", "b": "9"}, first, 2) == {}
    assert (
        param_changes(have, {"a": "1", "b": "2", "c": "3"}, first, 3)["param_drift.b"] == "attempt 1: 2 -> 9; attempt 3: 9 -> 2"
    )


def test_a_setting_that_no_longer_applies_is_no_change():
    """Earlier versions recorded the settings of all methods; a run that began there continues without those of others."""
    have = {"examples.method": "infobatch", "examples.removed": "0.3", "examples.swap": "0.05"}
    want = {"examples.method": "infobatch", "examples.removed": "0.4"}
    assert param_changes(have, want, {}, 1) == {"param_drift.examples.removed": "attempt 1: 0.3 -> 0.4"}
    gone = param_changes(have, {"examples.method": "all"}, {}, 1)
    assert len(gone) == 3 and gone["param_drift.examples.swap"] == "attempt 1: 0.05 -> (absent)"


def test_journal_only_starts_nothing(tmp_path: Path):
    shipper = start(tmp_path, TrackingConfig(to="journal"))
    assert shipper.finish() == (True, "") and list(tmp_path.iterdir()) == []


def test_a_shipper_that_cannot_start_or_dies_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    done, message = start(tmp_path, TrackingConfig()).finish()
    assert not done and "did not start" in message and f"trilevel sync {tmp_path}" in message
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    done, message = start(tmp_path, TrackingConfig()).finish()
    assert not done and "exited with code 1" in message
    with pytest.raises(JournalError, match="no such run"):
        sync.sync(tmp_path / "nowhere")
    with pytest.raises(JournalError, match="no such journal"):
        sync.sync(tmp_path)
    write(tmp_path, [{"kind": "step", "time": 0.0, "attempt": 0, "step": 1}])
    with pytest.raises(JournalError, match="no start line"):
        sync.sync(tmp_path)


def test_the_end_does_not_wait_for_a_shipper_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its trouble can't be noted where we look for it."""
    monkeypatch.setattr("trainer.tracking.shipper._no_room", lambda directory: True)
    process = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE)
    began = time.monotonic()
    done, message = Shipper(tmp_path, process).finish(30)
    process.kill()
    process.wait()
    assert not done and "no disk space at" in message and "journal is complete" not in message and time.monotonic() - began < 10


def test_a_run_goes_on_to_its_server_from_a_shell_that_does_not_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write(tmp_path / "tri", lines())
    assert JournalUploader(run).uri == f"sqlite:///{tmp_path}/mlflow.db"
    SyncState(uri="http://host:5000", run_id="abc", offset=7).save(run)
    assert (JournalUploader(run).uri, JournalUploader(run).state.run_id) == ("http://host:5000", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")  # the same with a slash
    assert JournalUploader(run).state.run_id == "abc"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")  # requested: all of it, again
    assert (JournalUploader(run).uri, JournalUploader(run).state.run_id, JournalUploader(run).state.offset) == (
        "http://other:5000",
        "",
        0,
    )
    (run / "mlflow.json").unlink()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    SyncState(uri="sqlite:////moved/away/mlflow.db", run_id="abc").save(run)
    assert JournalUploader(run).uri == f"sqlite:///{tmp_path}/mlflow.db"


class Memory:
    """A store that keeps every row it receives, and fails by a seed: before or after it takes a batch."""

    rows: list[Metric]
    taken: dict[str, Any]
    random: np.random.Generator

    def __init__(self, uri: str, runs: Path):
        self._fail(0.3)

    def _fail(self, chance: float) -> None:
        if self.random.random() < chance:
            raise ConnectionError("away")

    def find_or_make(self, *_: Any) -> tuple[str, str]:
        return "1", "run"

    def last_steps(self, run_id: str) -> dict[str, int]:
        self._fail(0.2)
        return {key: max(m.step for m in self.rows if m.key == key) for key in {m.key for m in self.rows}}

    def send(self, run_id: str, batch: list[Metric]) -> list[Metric]:
        self._fail(0.3)
        self.rows.extend(batch)
        self._fail(0.4)
        return []

    def begin(self, run_id: str, line: dict[str, Any], directory: Path) -> None:
        self._fail(0.3)
        self.taken["status"] = "RUNNING"

    def end(self, run_id: str, status: str, when: float) -> None:
        self._fail(0.3)
        self.taken["status"] = status

    def upload(self, run_id: str, path: Path, folder: str) -> None:
        self._fail(0.3)
        self.taken[path.name] = path.stat().st_size


@pytest.mark.parametrize("seed", range(8))
def test_whatever_fails_each_key_and_step_arrives_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int):
    """Requests fail before or after they take effect, shippers are killed anywhere, training is killed and resumes from an earlier step."""
    random = np.random.default_rng(seed)
    Memory.rows, Memory.taken, Memory.random = [], {}, random
    monkeypatch.setattr(shipment, "Store", Memory)
    monkeypatch.setattr(shipment, "BATCH", 30)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    whole = list(lines())
    first = [line for line in whole if line.get("step", 0) <= 20 and line["kind"] != "end"]
    again = [whole[0], *(line for line in whole[1:] if line.get("step", 0) > 10)]
    again = [line | {"attempt": 1, "time": line["time"] + 1000} for line in again]
    for part in (first, again):
        for piece in np.array_split(np.array(part, dtype=object), 3):
            write(tmp_path, list(piece))
            sent = JournalUploader(tmp_path)  # a fresh one: the one before was killed
            for _ in range(int(random.integers(0, 8))):
                with contextlib.suppress(ConnectionError):
                    sent.send_batch()
    assert sync.sync(tmp_path, patience=1e6).done
    found: dict[tuple[str, int], list[float]] = {}
    for m in Memory.rows:
        found.setdefault((m.key, m.step), []).append(m.value)
    assert found == expected(tmp_path) and len(found) == 257
    assert Memory.taken == {"status": "FINISHED", "journal.jsonl": (tmp_path / "journal.jsonl").stat().st_size}


def test_a_full_disk_does_not_end_the_shipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither the note of how far it is nor its own log can be written; what the journal has goes to MLflow all the same."""
    write(tmp_path, lines())
    Memory.rows, Memory.taken = [], {}
    monkeypatch.setattr(Memory, "_fail", lambda self, chance: None)
    monkeypatch.setattr(shipment, "Store", Memory)
    save = SyncState.save

    def full(state: SyncState, directory: Path) -> None:
        if state.run_id:  # the key that finds the run again was still noted
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, directory)

    monkeypatch.setattr(SyncState, "save", full)
    assert sync.sync(tmp_path, patience=1).done and Memory.taken["status"] == "FINISHED"
    assert sync.sync(tmp_path, patience=1).done and len(Memory.rows) == 257  # nothing twice, though nothing was noted
    code = (
        "from trainer.tracking import __main__ as t; from trainer.tracking.state import SyncResult; "
        "t.follow = lambda *_: SyncResult(True, 'all'); raise SystemExit(t.main(['.', '--follow']))"
    )
    with open("/dev/full", "w") as log:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=log, stderr=log).returncode == 0
