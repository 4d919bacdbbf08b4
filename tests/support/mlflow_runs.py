"""Runs that are shipped to MLflow, for its tests: a made-up training, the rows that arrived, the rows that should."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.journals import CONFIG, START, lines
from trainer.analysis.report.summary import write as write_report
from trainer.config.schema_run import TrackingConfig
from trainer.journal.reader import read
from trainer.journal.writer import Journal
from trainer.tracking.metrics import metrics
from trainer.tracking.shipper import start
from trainer.tracking.state import SyncState
from trainer.tracking.upload import FIRST

slow_server = pytest.mark.xdist_group("mlflow")  # one worker: the run on the sqlite default is made once


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch):
    """`tracking` sets these in its own process; here that is ours."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("TIMEOUT", "MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "3")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def start_line(uri: str | None = None, **changes: Any) -> dict[str, Any]:
    return START | {"config": CONFIG | {"tracking": {"uri": uri, "tags": {"who": "test"}}} | changes}


def fields(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("kind", "time", "attempt")}


def shipped(directory: Path) -> Path:
    """A whole run shipped to the sqlite default from nothing, made while the "training" went on."""
    reported = [line for line in lines() if line["kind"] != "start"]
    with Journal(directory) as journal:
        journal.write("start", **start_line())
        for name in FIRST:
            (directory / name).write_text(f"name: {name}\n")
        began = time.monotonic()
        shipper = start(directory, TrackingConfig(), every=0.5)
        assert time.monotonic() - began < 1
        for line in reported:
            journal.write(line["kind"], **fields(line))
        load = {host: {"cpu_utilization_percentage": 50.0 + i} for i, host in enumerate(("node-a", "node-b.cluster"))}
        journal.write("system", step=30, **load)
        journal.write("ranks", step=30, forward=[0.2, 0.3])
        until(lambda: set(FIRST) <= set(SyncState.load(directory).uploaded), 120, directory)  # while training continues
    (directory / "traces").mkdir()
    (directory / "traces" / "steps-1-2.rank-0.json.gz").write_bytes(b"x")
    (directory / "weights.safetensors").write_bytes(b"x")  # not requested: it stays here
    write_report(directory)
    done, message = shipper.finish(60)
    assert done, message + (directory / "logs/tracking.txt").read_text()
    return directory


def followed(directory: Path, uri: str | None = None) -> subprocess.Popen[bytes]:
    """A training in its own process; prints the shipper's process id when it has written 399 steps, then stays."""
    code = [sys.executable, "-m", "tests.support.jobs.shipped_run", str(directory), json.dumps(start_line(uri))]
    return subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def rows(uri: str, directory: Path) -> dict[tuple[str, int], list[float]]:
    """All rows of the run's metrics in MLflow: {(key, step): values}."""
    mlflow, run = client(uri), SyncState.load(directory).run_id
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
        for m in metrics(line, step):
            found.setdefault((m.key, m.step), [m.value])
    return found


def until(true: Any, seconds: float, directory: Path) -> None:
    ends = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends:
            log = directory / "logs/tracking.txt"
            pytest.fail(f"{json.dumps(SyncState.load(directory).__dict__)}\n{log.read_text() if log.exists() else ''}")
        time.sleep(0.05)
