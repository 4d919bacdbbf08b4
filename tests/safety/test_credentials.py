"""Passwords and tokens never reach journal, MLflow, messages, environment.txt or command lines; one process opens no port to others."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import __main__ as launch
from tests.conftest import ROOT, environment
from tests.support.journals import CONFIG, lines, write
from trainer.analysis.comparison.groups import NothingToCompare, from_mlflow
from trainer.analysis.mlflow_pages import page_of_run
from trainer.config.credentials import credential_in
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.preflight.doctor import tracking
from trainer.run.description import environment as environment_text
from trainer.tracking.address import address_of
from trainer.tracking.metrics import params
from trainer.tracking.sync import sync

SECRET = "HUNTER2"


class Server:
    """Answers every request with `answer`; keeps what it was asked."""

    def __init__(self) -> None:
        self.answer, self.status, self.asked = b"{}", 500, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.asked.append((self.path, self.headers.get("Authorization"), body))
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(outer.answer)))
                self.end_headers()
                self.wfile.write(outer.answer)

            do_GET = do_POST = handle_one

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "x")  # what the code sets is undone
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    for name in ("HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES", "ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_{name}", "3")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    made = Server()
    yield made
    made.close()


def run_with(folder: Path, uri: str | None) -> Path:
    start, *rest = lines()
    return write(folder, [start | {"config": CONFIG | {"tracking": {"uri": uri}}}, *rest])


def holding(folder: Path, journal: bool = False) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and (journal or path.name != "journal.jsonl")]
    return [path.name for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        (f"http://bob:{SECRET}@host:5000", "MLFLOW_TRACKING_PASSWORD"),
        (f"https://{SECRET}@host", "MLFLOW_TRACKING_TOKEN"),
        (f"http://bob:{SECRET}/x@host", "MLFLOW_TRACKING_PASSWORD"),
        (f"http://host/?token={SECRET}", "MLFLOW_TRACKING_TOKEN"),
        (f"postgresql://bob:{SECRET}@host/db", "MLFLOW_TRACKING_URI"),
        (f"postgresql://host/db?password={SECRET}", "MLFLOW_TRACKING_URI"),
    ],
)
def test_a_credential_in_tracking_uri_is_refused(uri: str, remedy: str, tmp_path: Path) -> None:
    quickstart = ROOT / "configs" / "quickstart.yaml"
    with pytest.raises(ConfigError, match=remedy) as refused:
        load(quickstart, [f"tracking.uri={uri}"])
    assert "tracking.uri" in str(refused.value) and SECRET not in str(refused.value)
    with pytest.raises(NothingToCompare, match=f"--uri .*{remedy}") as also:
        from_mlflow("e", tmp_path, uri)
    assert SECRET not in str(also.value)


@pytest.mark.parametrize(
    "uri",
    ["http://host:5000/mlflow", "sqlite:////home/a:b@c/mlflow.db", "postgresql://bob@host/db?sslmode=require", "databricks"],
)
def test_other_addresses_are_taken(uri: str) -> None:
    assert load(ROOT / "configs" / "quickstart.yaml", [f"tracking.uri={uri}"]).tracking.uri == uri
    assert credential_in(uri) is None and address_of(uri).opened == uri


def test_a_password_in_the_environment_is_used_and_not_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bob:{SECRET}@{server.address}")
    run = run_with(tmp_path / "runs" / "a", None)
    done, message = sync(run, 3.0)
    assert not done and f"http://{server.address}" in message and SECRET not in message
    assert server.asked and server.asked[0][1] == "Basic Ym9iOkhVTlRFUjI="  # bob:HUNTER2
    assert not holding(run) and SECRET not in "".join(capsys.readouterr())
    assert (run / "mlflow.json").stat().st_mode & 0o077 == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bob:{SECRET}@{server.address}")
    assert SECRET not in tracking(tmp_path / "runs").text() and SECRET not in page_of_run(run)


def test_a_query_in_the_environment_is_used_and_not_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.address}/?token={SECRET}")
    run = run_with(tmp_path / "a", None)
    assert SECRET not in sync(run, 0.5).message and not holding(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.address}/?token={SECRET}")
    with pytest.raises(NothingToCompare) as refused:
        from_mlflow("e", tmp_path / "out")
    assert SECRET not in str(refused.value)


def test_a_journal_of_an_earlier_version_gives_its_password_to_the_server_alone(server: Server, tmp_path: Path) -> None:
    uri = f"http://bob:{SECRET}@{server.address}"
    run = run_with(tmp_path / "a", uri)
    assert SECRET not in sync(run, 0.5).message and not holding(run)
    assert SECRET not in str(params(CONFIG | {"tracking": {"uri": uri}}))


def test_a_password_of_a_database_is_not_shown() -> None:
    found = address_of(f"postgresql://bob:{SECRET}@127.0.0.1:1/db")
    assert found.opened.endswith("@127.0.0.1:1/db") and SECRET in found.opened and SECRET not in found.uri
    assert SECRET not in found.redacted(f"could not connect by {found.opened} with {SECRET}")


def test_environment_txt_leaves_secrets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_API_TOKEN", "TORCH_HUB_SECRET", "CUDA_KEY", "NCCL_PASSPHRASE", "CUDA_PW", "OMP_CREDENTIALS"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("TORCH_HOME", f"http://bob:{SECRET}@host/x")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    text = environment_text()
    assert SECRET not in text and "TORCH_HOME=http://host/x" in text and "NCCL_DEBUG=INFO" in text


@pytest.mark.parametrize("uri", [f"http://bob:{SECRET}@h", f"http://h/?token={SECRET}"])
def test_no_credential_on_an_ssh_command_line(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    assert launch.main(["hosts", "configs/quickstart.yaml", "--hostfile", str(tmp_path / "hosts"), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err and "MLFLOW_TRACKING_URI is not passed on" in shown.err


@pytest.mark.parametrize(
    ("status", "answer", "remedy"),
    [
        (401, b"Unauthorized", "MLFLOW_TRACKING_TOKEN"),
        (403, b'{"error_code": "PERMISSION_DENIED"}', "MLFLOW_TRACKING_USERNAME"),
        (200, b"{}", "is this the address of an MLflow"),
    ],
)
def test_what_a_server_answers_comes_with_a_remedy(
    server: Server, tmp_path: Path, status: int, answer: bytes, remedy: str
) -> None:
    server.status, server.answer = status, answer
    done, message = sync(run_with(tmp_path / "a", f"http://{server.address}"), 0.5)
    assert not done and remedy in message and "is deleted" not in message


LISTENING = """
import json, sys, psutil, torch
from trainer.config.schema_run import EngineConfig
from trainer.data.order import BatchSplit
from trainer.engine.engine import Engine
engine = Engine(EngineConfig(kind=sys.argv[1], zero=1 if sys.argv[1] == "deepspeed" else 0, precision="float32"), BatchSplit(2, 1, 2))
model = torch.nn.Linear(2, 1)
engine.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
engine.backward(engine.forward(torch.ones(2, 2)).sum(), True)
assert engine.step()
print(json.dumps([c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]))
"""


@pytest.mark.parametrize("kind", ["deepspeed"])
def test_one_process_listens_on_no_interface_that_others_reach(kind: str) -> None:
    words = [sys.executable, "-c", LISTENING, kind]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) <= {"127.0.0.1", "::1"}


def test_the_credential_of_the_environment_is_kept_for_mlflow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    found = address_of(f"http://bob:{SECRET}%40x@{server.address}/")
    assert found.uri == found.opened == f"http://{server.address}"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("alice", f"{SECRET}@x")
