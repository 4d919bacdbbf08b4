"""Readers of files from elsewhere name the file and the remedy; the clock, FIFOs, trickling servers and changed weights do no harm."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import arguments as launch_arguments
from launch import hosts, sweep
from launch.job import Job, LaunchError, Nodes
from tests.support.journals import CONFIG, lines, write
from trainer.__main__ import main
from trainer.analysis.comparison.groups import NothingToCompare, compare, from_mlflow
from trainer.analysis.comparison.page import markdown, page
from trainer.analysis.history import history
from trainer.analysis.report.summary import summary
from trainer.analysis.report.summary import write as write_report
from trainer.checkpoint import directory
from trainer.config.errors import ConfigError, TrilevelError
from trainer.config.load import load
from trainer.data.remote.retry import TransientError
from trainer.journal.file import JournalError
from trainer.journal.reader import read
from trainer.journal.run_weights import run_weights
from trainer.journal.writer import Journal
from trainer.model.weights import save_weights
from trainer.run.directory import log_to
from trainer.storage.disk import Disk
from trainer.tracking import mlflow_client
from trainer.tracking import sync as sync_module
from trainer.tracking.state import SyncState
from trainer.tracking.sync import sync

DAMAGED = {
    "not UTF-8": b'{"kind": "message", "text": "\xff\xfe"}',
    "NULs": bytes(4096),
    "a list": b"[1,2]",
    "kind is a list": b'{"kind":["a"],"time":1}',
    "kind is a number": b'{"kind":5,"time":1}',
    "attempt is text": b'{"kind":"step","time":1.0,"attempt":"x","step":5}',
    "attempt is a list": b'{"kind":"step","time":1.0,"attempt":[1],"step":5}',
    "no time": b'{"kind":"step","attempt":0,"step":50}',
    "time is text": b'{"kind":"message","time":"now","attempt":0,"text":"x"}',
    "time is null": b'{"kind":"message","time":null,"attempt":0,"text":"x"}',
    "time is huge": b'{"kind":"message","time":1e300,"attempt":0,"text":"x"}',
    "time is NaN": b'{"kind":"step","time":NaN,"attempt":0,"step":99}',
    "resume without step": b'{"kind":"resume","time":1.0,"attempt":1}',
    "resume step is text": b'{"kind":"resume","time":1.0,"attempt":1,"step":"x"}',
    "top1 is text": b'{"kind":"eval","time":1.0,"attempt":0,"step":50,"top1":"x"}',
    "top1 is infinite": b'{"kind":"eval","time":1.0,"attempt":0,"step":50,"top1":1e400}',
    "step is huge": b'{"kind":"step","time":1.0,"attempt":0,"step":1000000000000000000000000000000,"images":1}',
    "5,000 digits": b'{"kind":"step","time":1.0,"step":' + b"1" * 5000 + b"}",
    "nested": b'{"kind":' + b"[" * 100000 + b"]" * 100000 + b"}",
    "world is 0": b'{"kind":"start","time":1.0,"attempt":1,"world":0}',
    "world is text": b'{"kind":"start","time":1.0,"attempt":1,"world":"many"}',
    "config is a list": b'{"kind":"start","time":1.0,"attempt":1,"config":[1]}',
    "tokens are 0": b'{"kind":"plateau","time":1.0,"attempt":0,"step":50,"tokens":[0,0],"keep_tokens":1}',
    "phases are numbers": b'{"kind":"step","time":1.0,"attempt":0,"step":50,"phases":{"x":1}}',
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_left_out_and_named(kind: str, tmp_path: Path) -> None:
    run = write(tmp_path / "a", lines())
    good = len(list(read(run)))
    with (run / "journal.jsonl").open("ab") as file:
        file.write(DAMAGED[kind] + b"\n")
    with pytest.warns(UserWarning, match=r"journal.jsonl: the line that ends at byte \d+ is left out"):
        assert len(list(read(run))) == good
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert summary(run).text
        write_report(run)
        found = compare([run, write(tmp_path / "b", lines(sparse=False))])
        assert page(found) and markdown(found)
        with Journal(run) as journal:
            journal.write("message", text="resumed")
        assert len(list(read(run))) == good + 1
    point = sweep.with_status(sweep.Point(Job("c.yaml"), "x", run))
    assert sweep.table([point])


def test_an_evaluation_without_a_score_counts_for_nothing(tmp_path: Path) -> None:
    run = write(tmp_path / "a", [*lines(), {"kind": "eval", "time": 1.0, "attempt": 0, "step": 30, "ema": False}])
    assert "84.38 %" in summary(run).text


@pytest.mark.parametrize("what", ["folder", "fifo", "unreadable"])
def test_a_journal_that_is_not_a_file(what: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.mkdir() if what == "folder" else os.mkfifo(path) if what == "fifo" else path.symlink_to(path)
    with pytest.raises(JournalError, match=r"journal\.jsonl"):
        list(read(tmp_path))
    with pytest.raises(JournalError, match=r"journal\.jsonl"):
        Journal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe name: x", b"name: 2024-13-45", b"seed: " + b"1" * 5000, b"name: " + b"[" * 5000, None]
)
def test_a_configuration_of_odd_bytes_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load(path)
    if content and b"seed" not in content and b"2024" not in content:  # the launcher reads a name as the text that it is
        with pytest.raises(LaunchError, match=r"c\.yaml"):
            sweep.points([str(path)], [], [], "0", "s")


def test_every_error_for_people_has_one_base() -> None:
    import trainer.analysis.comparison.groups
    import trainer.checkpoint.save_load
    import trainer.provenance.recorded_run
    import trainer.tracking.mlflow_client

    def below(kind: type[BaseException]) -> set[type[BaseException]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert trainer is not None
    ours = {kind for kind in below(Exception) if kind.__module__.startswith("trainer.") and not kind.__name__.startswith("_")}
    internal = tuple(below(TransientError))
    assert not [kind for kind in ours if not issubclass(kind, (TrilevelError, *internal))]
    assert len(ours) > 10


def test_an_internal_error_keeps_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise TransientError("internal")

    monkeypatch.setitem(main.__globals__["COMMANDS"], "report", fails)
    with pytest.raises(TransientError):
        main(["report", "x"])


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2):
        directory.write(folder, step, {"w": [b"abc"]}, {"step": step}, lambda _: False, Disk())
    return folder


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "list", "nested", "text"])
def test_a_state_that_is_damaged_or_not_a_file_is_ignored(kind: str, checkpoints: Path) -> None:
    path = checkpoints / "step-00000002" / "state.json"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text({"list": "[]", "nested": "[" * 100_000, "text": '{"format": 1, "bytes": []}'}[kind])
    found = directory.newest(checkpoints)
    assert found.path is not None and found.path.name == "step-00000001"
    assert len(found.damaged) == 1 and "state.json" in found.damaged[0]


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_a_pointer_that_is_not_a_file_is_ignored(kind: str, checkpoints: Path) -> None:
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir() if kind == "folder" else os.mkfifo(checkpoints / "latest")
    found = directory.newest(checkpoints).path
    assert found is not None and found.name == "step-00000002"


def test_a_log_that_can_not_be_opened_is_left_out(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "rank-0.txt").mkdir()
    log_to(tmp_path / "rank-0.txt")
    assert "rank-0.txt: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["[1]", '{"offset": "x"}', "[" * 100_000, '{"uri": 5}'])
def test_a_damaged_state_of_the_upload_starts_anew(state: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow.json").write_text(state)
    assert (SyncState.load(tmp_path).offset, SyncState.load(tmp_path).uri) == (0, "")


@pytest.mark.parametrize("jump", [-86400.0, 31_536_000.0])
def test_a_clock_that_is_set_changes_no_duration(jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, offset = time.time, 0.0
    monkeypatch.setattr("time.time", lambda: real() + offset)
    start, *rest = lines()
    with Journal(tmp_path) as journal:
        for i, line in enumerate([start, *rest]):
            offset = jump if i > 10 else 0.0
            journal.write(line["kind"], **{k: v for k, v in line.items() if k not in ("kind", "time", "attempt")})
    run = history(tmp_path)
    assert 0 <= run.last.elapsed < 60 and 0 <= run.last.device_seconds < 120


def test_changed_weights_are_not_scored(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"head.weight": torch.ones(4, 4)})
    content = Disk().content(path)
    about = {"weights": {"bytes": content.size, "hash": content.hash}}
    where = {"time": 1.0, "attempt": 0, "step": 7, "path": "checkpoints/step-00000007"}
    write(tmp_path, [{"kind": "checkpoint", **where, "weights": {"hash": "older"}}, {"kind": "checkpoint", **where, **about}])
    assert run_weights(tmp_path, f"eval {tmp_path}") == path
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"eval .*weights.safetensors has the hash .* at step 7.*trilevel export"):
        run_weights(tmp_path, f"eval {tmp_path}")
    shutil.copytree(tmp_path, tmp_path / "copy")
    (tmp_path / "copy" / "config.yaml").write_text("name: x")
    (tmp_path / "copy" / "journal.jsonl").unlink()
    assert run_weights(tmp_path / "copy", "eval copy")  # nothing to compare with


@pytest.mark.timeout(60)
def test_sync_gives_up_a_server_that_trickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "GRACE", 1.0)
    for name in ("HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES", "ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_{name}", "3")
    over = threading.Event()

    def trickle(client: socket.socket) -> None:
        with client:
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not over.wait(0.2):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while not over.is_set():
                try:
                    client = server.accept()[0]
                except OSError:
                    return
                threading.Thread(target=trickle, args=[client], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        start, *rest = lines()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        run = write(tmp_path / "a", [start | {"config": CONFIG | {"tracking": {"uri": uri}}}, *rest])
        began = time.monotonic()
        done, message = sync(run, 1.0)
        took = time.monotonic() - began
        over.set()
    assert not done and "no end of an answer after 2 s" in message and took < 15
    assert json.loads((run / "mlflow.json").read_text())["offset"] == 0


@pytest.mark.timeout(120)
def test_an_answer_of_a_server_without_end_does_not_take_the_memory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES", "ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_{name}", "30")
    monkeypatch.setattr(sync_module, "ANSWER", 200 << 20)
    monkeypatch.setattr(mlflow_client, "ANSWER", 200 << 20)
    sent = [0]

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            with contextlib.suppress(OSError):
                while sent[0] < 3 << 30:
                    sent[0] += self.wfile.write(bytes(1 << 20))

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        start, *rest = lines()
        run = write(tmp_path / "a", [start | {"config": CONFIG | {"tracking": {"uri": uri}}}, *rest])
        done, message = sync(run, 0.1)
        assert not done and "does not fit into" in message
        assert sent[0] < 500 << 20
        with pytest.raises(NothingToCompare, match="does not fit into"):
            from_mlflow("e", tmp_path, uri)
        server.shutdown()
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_a_hostfile_of_100_000_hosts_is_read_at_once() -> None:
    began = time.process_time()
    assert len(hosts.read("".join(f"node{number} slots=8\n" for number in range(100_000)))) == 100_000
    assert time.process_time() - began < 10  # comparing each with each took minutes
    with pytest.raises(LaunchError, match="line 2: node1 is listed twice"):
        hosts.read("node1\nme@node1\n")


@pytest.mark.parametrize("number", ["9" * 5000, "８", "0", "-1", "1_0"])
def test_a_number_of_odd_digits_is_refused_by_name(number: str) -> None:
    """int() raises a ValueError of its own at 4300 digits, and takes digits of other scripts."""
    with pytest.raises(LaunchError, match="line 1: 'slots="):
        hosts.read(f"node1 slots={number}")
    with pytest.raises(LaunchError, match="--nodes"):
        Nodes.read(number)
    with pytest.raises(LaunchError, match=r"--port: .*not a port"):
        launch_arguments.parse(["hosts", "configs/quickstart.yaml", "--hostfile", "x", "--port", number])
