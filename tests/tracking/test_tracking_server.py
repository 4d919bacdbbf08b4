"""The tracker can't hurt training and loses nothing: a real `mlflow server` that is down, silent, killed, sick, and back.

The "training" of these tests is a process or this one writing a journal; the shipper is the real one.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
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

from tests.support.mlflow_runs import client, expected, followed, rows, slow_server, start_line, until
from tests.support.mlflow_runs import surroundings as surroundings
from trainer.config.schema_run import TrackingConfig
from trainer.journal.writer import Journal
from trainer.tracking import sync
from trainer.tracking.shipper import start
from trainer.tracking.state import SyncState

pytestmark = [slow_server, pytest.mark.dist]


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


@pytest.mark.parametrize("how", ["silent", pytest.param("killed", marks=pytest.mark.slow)])
def test_server_down_then_up_then_away_then_back(server: Server, tmp_path: Path, how: str):
    """Away is silent (it takes the request and never answers: the worst for a logger) or killed and started again."""
    directory = tmp_path / "runs" / "tri"
    usual = training(Journal(tmp_path / "alone"), range(300))
    patience = max(0.5, 5 * float(np.percentile(usual, 99)))  # a logger that calls the server itself: 3 s and more
    server.stop()
    with Journal(directory) as journal:
        journal.write("start", **start_line(server.uri))
        began = time.monotonic()
        shipper = start(directory, TrackingConfig(uri=server.uri), every=0.2, linger=2)
        assert time.monotonic() - began < 1
        server.start()  # takes seconds: the shipper finds no server at first
        assert np.percentile(training(journal, range(1, 1200)), 99) < patience
        server.wait()
        until(lambda: "debug/m" in SyncState.load(directory).last, 30, directory)
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
    assert sync.sync(directory) == (True, f"journal fully uploaded to MLflow at {server.uri}")
    assert rows(server.uri, directory) == expected(directory)
    assert client(server.uri).get_run(SyncState.load(directory).run_id).info.status == "FINISHED"


class Sick(http.server.BaseHTTPRequestHandler):
    """A proxy in front of the server: `mood` "well" passes on, "500" fails, "lost" passes on and answers too late."""

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
        until(lambda: "500" in SyncState.load(directory).trouble, 30, directory)
        Sick.mood = "lost"
        until(lambda: Sick.lost > 0, 30, directory)
        time.sleep(1)
        os.kill(shipper, signal.SIGKILL)  # its batch has arrived, it does not know
        os.kill(trainer.pid, signal.SIGINT)
    finally:
        trainer.kill()
        trainer.wait()
    until(lambda: not psutil.pid_exists(shipper), 30, directory)  # it holds the lock until it is gone
    known = SyncState.load(directory)
    assert known.last.get("basic/loss", -1) < 399 and rows(server.uri, directory)[("basic/loss", 1)] == [0.5]
    Sick.mood = "well"
    assert sync.sync(directory).done
    found = rows(server.uri, directory)
    assert found == expected(directory) and {len(values) for values in found.values()} == {1}
    assert client(server.uri).get_run(known.run_id).info.status == "RUNNING"  # silent for seconds only: it may live elsewhere
    proxy.shutdown()
