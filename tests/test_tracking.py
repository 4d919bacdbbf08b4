"""The tracker can't hurt training and loses nothing: on the sqlite default, and a real `mlflow server` down, sick, back.

The "training" of these tests is a process or this one writing a journal; the shipper is the real one.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.run_of_lines import CONFIG, START, lines, write
from trainer import shipment, tracking
from trainer.compare import NothingToCompare, compare, from_mlflow
from trainer.compare_page import warnings
from trainer.journal import Journal, JournalError, read
from trainer.measures import Measure, drift, measures, params, tags
from trainer.report import where_to_look
from trainer.report import write as write_report
from trainer.sections import Tracking
from trainer.shipment import FIRST, Shipment
from trainer.shipper import Shipper, State, start

ROOT = Path(__file__).resolve().parent.parent
slow_server = pytest.mark.xdist_group("mlflow")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch):
    """`tracking` sets these in its own process; here that is ours."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("TIMEOUT", "MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "3")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


# -- what is sent, without MLflow ----------------------------------------------------------------------------------------


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
    found = {(m.key, m.value) for m in measures(line, 7)}
    assert found == {("plan/keep_tokens", 0.7), ("plan/tokens/00", 17), ("plan/tokens/01", 12), ("plan/facts/a b/_", 1)}
    assert {(m.time, m.step) for m in measures(line, 7)} == {(2500, 7)}
    line = {"kind": "eval", "time": 0, "top1": 0.5, "ema": True, "per_class": [0.5, 0.5]}
    assert {m.key for m in measures(line, 1)} == {"eval_ema/top1"}  # the classes are the journal's
    line = {"kind": "step", "time": 0, "phases": {"forward": {"max": 0.4, "slowest": 3, "slowest_host": "node-b"}}}
    assert {m.key for m in measures(line, 1)} == {"train/phases/forward/max", "train/phases/forward/slowest"}
    assert measures({"kind": "epoch", "time": 0, "kept": 2, "examples": 4, "batch": 3}, 1) == []  # a resume inside the epoch
    assert ("epoch/kept_share", 0.5) in {m[:2] for m in measures({"kind": "epoch", "time": 0, "kept": 2, "examples": 4}, 1)}
    assert (
        measures({"kind": "broken", "time": 0, "id": 4}, 1) == []
        and measures({"kind": "start", "time": 0, "world": 4}, 1) == []
    )


def test_long_values_are_cut_and_say_so():
    said = params({"model": {"args": {}, "name": "x" * 600}, "list": [1, 2]})
    assert said["model.args"] == "{}" and said["list"] == "[1, 2]"
    assert len(said["model.name"]) == 500 and said["model.name"].endswith("(cut, 600 characters; whole in config.yaml)")
    found = tags(START | {"attempt": 1})
    assert found["commit"] == found["mlflow.source.git.commit"] == "c0ffee" and found["version.torch"] == "2.15.0"
    assert found["pixels"] == "" and tags(START | {"pixels": ["short side 256"]})["pixels"] == "short side 256"
    assert found["who"] == "test" and found["attempts"] == "2" and found["hosts"] == "one" and "config" not in found


def test_drift_names_what_a_resume_changed():
    have = {"a": "1", "b": "2", "c": "3"}
    first = drift(have, {"a": "1", "b": "9"}, {}, 1)
    assert first == {"param_drift.b": "attempt 1: 2 -> 9", "param_drift.c": "attempt 1: 3 -> (absent)"}
    assert drift(have, {"a": "1", "b": "9"}, first, 2) == {}
    assert drift(have, {"a": "1", "b": "2", "c": "3"}, first, 3)["param_drift.b"] == "attempt 1: 2 -> 9; attempt 3: 9 -> 2"


def test_journal_only_starts_nothing(tmp_path: Path):
    shipper = start(tmp_path, Tracking(to="journal"))
    assert shipper.finish() == (True, "") and list(tmp_path.iterdir()) == []


def test_a_shipper_that_cannot_start_or_dies_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    done, message = start(tmp_path, Tracking()).finish()
    assert not done and "did not start" in message and f"trilevel sync {tmp_path}" in message
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    done, message = start(tmp_path, Tracking()).finish()
    assert not done and "ended with code 1" in message
    with pytest.raises(JournalError, match="no such run"):
        tracking.sync(tmp_path / "nowhere")
    with pytest.raises(JournalError, match="no such journal"):
        tracking.sync(tmp_path)
    write(tmp_path, [{"kind": "step", "time": 0.0, "attempt": 0, "step": 1}])
    with pytest.raises(JournalError, match="no start line"):
        tracking.sync(tmp_path)


def test_the_end_does_not_wait_for_a_shipper_without_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its trouble can't be noted where we look for it."""
    monkeypatch.setattr("trainer.shipper._no_room", lambda directory: True)
    process = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE)
    began = time.monotonic()
    done, message = Shipper(tmp_path, process).finish(30)
    process.kill()
    process.wait()
    assert not done and "no room at" in message and "the journal has" not in message and time.monotonic() - began < 10


class Memory:
    """Stands for a store that keeps every row it is sent, and fails by a seed: before a batch is taken or behind it."""

    rows: list[Measure]
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

    def send(self, run_id: str, batch: list[Measure]) -> list[Measure]:
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
    """Requests fail before or behind the deed, shippers are killed anywhere, the training is killed and goes on from behind."""
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
            sent = Shipment(tmp_path)  # a fresh one: the one before was killed
            for _ in range(int(random.integers(0, 8))):
                with contextlib.suppress(ConnectionError):
                    sent.go()
    assert tracking.sync(tmp_path, patience=1e6).done
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
    save = State.save

    def full(state: State, directory: Path) -> None:
        if state.run_id:  # the key that finds the run again was still noted
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, directory)

    monkeypatch.setattr(State, "save", full)
    assert tracking.sync(tmp_path, patience=1).done and Memory.taken["status"] == "FINISHED"
    assert tracking.sync(tmp_path, patience=1).done and len(Memory.rows) == 257  # nothing twice, though nothing was noted
    code = "from trainer import tracking as t; t._follow = lambda *_: t.Shipped(True, 'all'); raise SystemExit(t.main(['.', '--follow']))"
    with open("/dev/full", "w") as log:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=log, stderr=log).returncode == 0


# -- against MLflow ------------------------------------------------------------------------------------------------------


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def rows(uri: str, directory: Path) -> dict[tuple[str, int], list[float]]:
    """All rows of the run's metrics in MLflow: {(key, step): values}."""
    mlflow, run = client(uri), State.load(directory).run_id
    found: dict[tuple[str, int], list[float]] = {}
    for key in mlflow.get_run(run).data.metrics:
        for metric in mlflow.get_metric_history(run, key):
            found.setdefault((key, metric.step), []).append(metric.value)
    return found


def expected(directory: Path) -> dict[tuple[str, int], list[float]]:
    """What the journal has, the first of every (key, step)."""
    found: dict[tuple[str, int], list[float]] = {}
    step = 0
    for line in read(directory):
        step = line.get("step", step)
        for m in measures(line, step):
            found.setdefault((m.key, m.step), [m.value])
    return found


def start_line(uri: str | None = None, **changes: Any) -> dict[str, Any]:
    return START | {"config": CONFIG | {"tracking": {"uri": uri, "tags": {"who": "test"}}} | changes}


def fields(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("kind", "time", "attempt")}


def training(journal: Journal, steps: range) -> list[float]:
    """Log steps in lines of a kilobyte; what each write took, in seconds. Two metrics each: MLflow takes 2,000 a second."""
    took = []
    for step in steps:
        began = time.perf_counter()
        journal.write(
            "step", epoch=0, batch=step, step=step, loss=1 / (1 + step), m=-step, **{f"text{i}": "x" * 20 for i in range(30)}
        )
        took.append(time.perf_counter() - began)
        time.sleep(0.002)
    return took


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run shipped to the sqlite default from nothing, made while the "training" went on."""
    directory = tmp_path_factory.mktemp("default") / "runs" / "tri"
    told = [line for line in lines() if line["kind"] != "start"]
    with Journal(directory) as journal:
        journal.write("start", **start_line())
        for name in FIRST:
            (directory / name).write_text(f"name: {name}\n")
        began = time.monotonic()
        shipper = start(directory, Tracking(), every=0.5)
        assert time.monotonic() - began < 1
        for line in told:
            journal.write(line["kind"], **fields(line))
        load = {host: {"cpu_utilization_percentage": 50.0 + i} for i, host in enumerate(("node-a", "node-b.cluster"))}
        journal.write("system", step=30, **load)
        journal.write("ranks", step=30, forward=[0.2, 0.3])
        until(lambda: set(FIRST) <= set(State.load(directory).uploaded), 120, directory)  # while the training goes on
    (directory / "traces").mkdir()
    (directory / "traces" / "steps-1-2.rank-0.json.gz").write_bytes(b"x")
    (directory / "weights.safetensors").write_bytes(b"x")  # not asked for: it stays here
    write_report(directory)
    done, message = shipper.finish(60)
    assert done, message + (directory / "logs/tracking.txt").read_text()
    return directory


@slow_server
@pytest.mark.dist
def test_sqlite_default_has_everything_once(default_run: Path):
    uri = f"sqlite:///{default_run.parent}/mlflow.db"
    assert where_to_look(default_run).startswith(f"mlflow ui --backend-store-uri {uri}")
    found = rows(uri, default_run)
    assert found == expected(default_run)
    assert {
        ("train/loss", 20),
        ("eval/top1", 30),
        ("eval_ema/top1", 30),
        ("plan/tokens/03", 20),
        ("run/device_hours", 30),
        ("system/node-a/cpu_utilization_percentage", 30),
        ("system/node-b.cluster/cpu_utilization_percentage", 30),
    } <= set(found)
    assert not any("ranks" in key or "per_class" in key for key, _ in found)
    mlflow, state = client(uri), State.load(default_run)
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
    (times,) = {m.timestamp for m in mlflow.get_metric_history(state.run_id, "train/loss") if m.step == 30}
    assert times == int([line["time"] for line in read(default_run) if line["kind"] == "step"][-1] * 1000)


@slow_server
@pytest.mark.dist
def test_compare_reads_an_experiment_here_or_from_mlflow(default_run: Path, tmp_path: Path):
    uri = f"sqlite:///{default_run.parent}/mlflow.db"
    assert from_mlflow("trilevel", tmp_path, uri) == ([default_run], [])
    state = (default_run / "mlflow.json").read_text()
    (default_run / "mlflow.json").write_text(state.replace(State.load(default_run).run_id, "0" * 32))
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


@slow_server
@pytest.mark.dist
def test_experiments_that_cannot_be_read_are_refused_and_nothing_is_made(default_run: Path, tmp_path: Path):
    shutil.copy(default_run.parent / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(NothingToCompare, match=r"'other': not at sqlite.*there are Default, trilevel"):
        from_mlflow("other", tmp_path, uri)
    mlflow = client(uri)
    mlflow.create_run(mlflow.get_experiment_by_name("trilevel").experiment_id, run_name="young")
    assert from_mlflow("trilevel", tmp_path / "out", uri)[1] == ["young"]
    said = warnings(compare([default_run], missing=["young"]))
    assert said == ["left out, without a journal in MLflow: young; bring it there by trilevel sync RUN"]
    with pytest.raises(NothingToCompare, match="no such database"):
        from_mlflow("trilevel", tmp_path, f"sqlite:///{tmp_path}/elsewhere/mlflow.db")
    assert not (tmp_path / "elsewhere").exists()
    began = time.monotonic()
    with pytest.raises(NothingToCompare, match="give run directories"):
        from_mlflow("trilevel", tmp_path, "http://127.0.0.1:9")
    assert time.monotonic() - began < 10  # MLflow's own retries: four minutes


@slow_server
@pytest.mark.dist
def test_resume_goes_on_in_the_same_run_with_nothing_twice(default_run: Path, tmp_path: Path):
    """Killed behind step 20, gone on from 10 with another learning rate; the shipper of the first attempt is killed as well."""
    directory = shutil.copytree(default_run, tmp_path / "runs" / "tri")
    shutil.copy(default_run.parent / "mlflow.db", tmp_path / "runs" / "mlflow.db")
    for name in ("journal.jsonl", "mlflow.json"):
        (directory / name).unlink()
    uri, whole = f"sqlite:///{tmp_path}/runs/mlflow.db", list(lines())
    first = [line for line in whole if 0 < line.get("step", 0) <= 20 and line["kind"] != "start"]
    write(directory, [whole[0] | start_line() | {"time": whole[0]["time"]}, *first])

    assert tracking.sync(directory).done
    state = State.load(directory)
    assert client(uri).get_run(state.run_id).info.status == "KILLED"  # it has been silent for years
    state.offset, state.last = 0, {}  # as if the shipper had been killed before it noted what had arrived
    state.save(directory)

    again = [line for line in whole if line["kind"] not in ("start", "epoch") and line.get("step", 0) > 10]
    with Journal(directory) as journal:
        journal.write("start", **start_line(optim={"lr": 5e-4, "name": "adamw"}))
        journal.write("resume", epoch=1, batch=0, step=10)
        for line in again:  # the times and the rates differ, as they would
            journal.write(line["kind"], **fields(line))
    assert tracking.sync(directory).done
    found = rows(uri, directory)
    assert found == expected(directory)
    assert ("train/loss", 30) in found and {len(values) for values in found.values()} == {1}
    run = client(uri).get_run(state.run_id)
    assert State.load(directory).run_id == state.run_id and run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001" and run.data.tags["param_drift.optim.lr"] == "attempt 1: 0.001 -> 0.0005"
    assert run.data.tags["attempts"] == "2"


FOLLOWED = """
import json, sys, time
from trainer import shipper
from trainer.sections import Tracking
from trainer.journal import Journal
journal = Journal(sys.argv[1])
journal.write("start", **json.loads(sys.argv[2]))
process = shipper.start(sys.argv[1], Tracking(), every=0.2, linger=20).process
for step in range(1, 400):
    journal.write("step", epoch=0, batch=step, step=step, loss=1 / (1 + step))
    time.sleep(0.002)
print(process.pid, flush=True)
time.sleep(60)
"""


def followed(directory: Path, uri: str | None = None) -> subprocess.Popen[bytes]:
    """A training of its own process; tells the shipper's process id when it has written 399 steps, then stays."""
    code = [sys.executable, "-c", FOLLOWED, str(directory), json.dumps(start_line(uri))]
    return subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)


@slow_server
@pytest.mark.dist
def test_training_killed_the_shipper_brings_the_rest_and_ends(default_run: Path, tmp_path: Path):
    directory = tmp_path / "runs" / "tri"
    directory.mkdir(parents=True)
    shutil.copy(default_run.parent / "mlflow.db", tmp_path / "runs" / "mlflow.db")
    trainer = followed(directory)
    assert trainer.stdout
    shipper = psutil.Process(int(trainer.stdout.readline()))
    until(lambda: State.load(directory).last, 30, directory)
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler ends a job by signals to all of its processes
        shipper.send_signal(number)
    done, message = tracking.sync(directory)
    assert not done and "a shipper is at work" in message
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert psutil.wait_procs([shipper], timeout=20)[0]
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert rows(uri, directory) == expected(directory)
    assert client(uri).get_run(State.load(directory).run_id).info.status == "KILLED"


@slow_server
@pytest.mark.dist
def test_deleted_run_is_said_and_a_refused_metric_holds_nothing_up(
    default_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = tmp_path / "runs" / "other"
    directory.parent.mkdir()
    shutil.copy(default_run.parent / "mlflow.db", tmp_path / "runs" / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    write(directory, lines(epochs=1, sparse=False))
    monkeypatch.setattr("trainer.measures._key", lambda name: name.replace("/loss", "/loss!"))
    assert tracking.sync(directory).done
    assert State.load(directory).refused == 5 + 2  # train/loss at five log steps, eval/loss of both
    assert ("train/lr", 10) in rows(uri, directory) and ("train/loss!", 10) not in rows(uri, directory)
    client(uri).delete_run(State.load(directory).run_id)
    write(directory, [{"kind": "step", "time": 1.8e9, "attempt": 0, "step": 11, "lr": 1.0}])
    done, message = tracking.sync(directory)
    assert not done and "was deleted there: delete mlflow.json" in message


class Server:
    """A real `mlflow server` on sqlite that can be stopped and started again."""

    def __init__(self, store: Path, port: int):
        self.uri, self._store, self._port = f"http://127.0.0.1:{port}", store, port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = [
            "--backend-store-uri",
            f"sqlite:///{self._store}",
            "--artifacts-destination",
            str(self._store.parent / "served"),
        ]
        words += ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        with (self._store.parent / "server.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip

    def wait(self) -> None:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        pytest.fail((self._store.parent / "server.txt").read_text())

    def hold(self) -> None:
        assert self._process
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(default_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = tmp_path_factory.mktemp("server") / "server.db"
    shutil.copy(default_run.parent / "mlflow.db", store)  # spares the seconds that making the tables takes
    server = Server(store, port)
    yield server
    server.stop()


@slow_server
@pytest.mark.dist
@pytest.mark.parametrize("how", ["silent", pytest.param("killed", marks=pytest.mark.slow)])
def test_server_down_then_up_then_away_then_back(server: Server, tmp_path: Path, how: str):
    """Away is silent (it takes the request and never answers: the worst for a logger) or killed and started again."""
    directory = tmp_path / "runs" / "tri"
    usual = training(Journal(tmp_path / "alone"), range(300))
    patience = max(0.5, 5 * float(np.percentile(usual, 99)))  # a logger that asks the server itself: 3 s and more
    server.stop()
    with Journal(directory) as journal:
        journal.write("start", **start_line(server.uri))
        began = time.monotonic()
        shipper = start(directory, Tracking(uri=server.uri), every=0.2, linger=2)
        assert time.monotonic() - began < 1
        server.start()  # takes seconds: the shipper finds nobody at first
        assert np.percentile(training(journal, range(1, 1200)), 99) < patience
        server.wait()
        until(lambda: "train/m" in State.load(directory).last, 30, directory)
        server.stop() if how == "killed" else server.hold()
        assert np.percentile(training(journal, range(1200, 1800)), 99) < patience
        journal.write("end", status="finished", step=1799)
    began = time.monotonic()
    done, message = shipper.finish(30)
    assert not done and "trilevel sync" in message and time.monotonic() - began < 15
    assert shipper.process
    shipper.process.wait(40)  # it lingers 2 s and what its last request takes
    server.start() if how == "killed" else server.go_on()
    server.wait()
    assert tracking.sync(directory) == (True, f"MLflow has all of it ({server.uri})")
    assert rows(server.uri, directory) == expected(directory)
    assert client(server.uri).get_run(State.load(directory).run_id).info.status == "FINISHED"


class Sick(http.server.BaseHTTPRequestHandler):
    """Stands before the server: `mood` "well" passes on, "500" fails, "lost" passes on and answers too late."""

    target, mood, lost = 0, "well", 0

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        mood, logging = Sick.mood, "log-batch" in self.path and b"metrics" in body
        status, answer = 500, b'{"error_code": "INTERNAL_ERROR", "message": "sick"}'
        if mood != "500":
            other = http.client.HTTPConnection("127.0.0.1", Sick.target)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "accept-encoding")}
            other.request(self.command, self.path, body, headers)
            came = other.getresponse()
            status, answer = came.status, came.read()
            other.close()
        if mood == "lost" and logging:
            Sick.lost += 1
            time.sleep(4)  # the client's patience is 3 s
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_PATCH = _pass_on

    def log_message(self, format: str, *args: Any) -> None:
        pass


@slow_server
@pytest.mark.dist
def test_answers_that_fail_or_come_too_late_are_neither_lost_nor_doubled(server: Server, tmp_path: Path):
    """500s first; then batches that arrive while their answer does not; killed in the middle, shipper and training both."""
    if server._process is None:
        server.start()
    server.wait()
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sick)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{proxy.server_port}"
    Sick.target, Sick.mood = int(server.uri.rpartition(":")[2]), "500"
    directory = tmp_path / "runs" / "tri"
    trainer = followed(directory, uri)
    assert trainer.stdout
    shipper = int(trainer.stdout.readline())
    try:
        until(lambda: "500" in State.load(directory).trouble, 30, directory)
        Sick.mood = "lost"
        until(lambda: Sick.lost > 0, 30, directory)
        time.sleep(1)
        os.kill(shipper, signal.SIGKILL)  # its batch has arrived, it does not know
        os.kill(trainer.pid, signal.SIGINT)
    finally:
        trainer.kill()
        trainer.wait()
    known = State.load(directory)
    assert known.last.get("train/loss", -1) < 399 and rows(server.uri, directory)[("train/loss", 1)] == [0.5]
    Sick.mood = "well"
    assert tracking.sync(directory).done
    found = rows(server.uri, directory)
    assert found == expected(directory) and {len(values) for values in found.values()} == {1}
    assert client(server.uri).get_run(known.run_id).info.status == "RUNNING"  # silent for seconds only: it may live elsewhere
    proxy.shutdown()


def until(true: Any, seconds: float, directory: Path) -> None:
    ends = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends:
            log = directory / "logs/tracking.txt"
            pytest.fail(f"{json.dumps(State.load(directory).__dict__)}\n{log.read_text() if log.exists() else ''}")
        time.sleep(0.05)
