"""`trilevel doctor`: each check names the problem and a remedy; the ssh of these tests runs commands on this machine."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from trainer.preflight import doctor, installation
from trainer.preflight import hosts as neighbours


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch) -> Path:
    """A folder whose programs come before the machine's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_one_line_each_and_an_honest_exit_code(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    code = doctor.main()
    out = capsys.readouterr().out.splitlines()
    for name in ("python", "versions", "GPUs", "compiler", "runs", "clock", "disk", "shared memory", "MLflow"):
        assert sum(line[5:].startswith(name) for line in out) == 1, name
    failed = [line for line in out if line.startswith("fail")]
    assert code == bool(failed) and out[-1] == (f"{len(failed)} check(s) failed" if failed else "ready to train")
    assert all("  ->  " in line for line in failed)
    assert list(tmp_path.iterdir()) == []  # looks, and leaves nothing


def test_failures_are_counted(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "doctor", lambda hosts, ssh_config, say: [installation.Finding("disk", "fail", "full", "free some")]
    )
    assert doctor.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 check(s) failed"


def test_a_library_that_is_missing_hides_nothing_else(monkeypatch):
    def missing():
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(doctor, "devices", missing)
    lines = {line.name: line for line in doctor.doctor()}
    assert lines["GPUs"].status == "fail" and "pip install" in lines["GPUs"].remedy and "disk" in lines


def test_versions_against_the_tested_set(tmp_path):
    same = tmp_path / "same.txt"
    same.write_text(f"torch=={torch.__version__.partition('+')[0]}\nno-such-library==1.0\n")
    assert installation.versions(same)[1].status == "ok"  # optional libraries may be absent
    other = tmp_path / "other.txt"
    other.write_text("torch==0.0.1\n")
    line = installation.versions(other)[1]
    assert line.status == "note" and "tested 0.0.1" in line.found and "pip install -c" in line.remedy
    line = installation.versions(tmp_path / "constraints.txt")[1]
    assert line.status == "note" and "wheel" in line.found


def test_a_required_library_that_is_absent_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(installation, "_requirements", lambda: {"no-such-library"})
    (tmp_path / "c.txt").write_text("No_Such.Library==1.0\n")
    line = installation.versions(tmp_path / "c.txt")[1]
    assert line.status == "fail" and "No_Such.Library" in line.found


def test_the_compiler_must_compile(tools, monkeypatch):
    assert installation.compiler().status == "ok"  # CI has one; without it nothing of DeepSpeed works
    script(tools, "broken", "echo 'try.cpp:1: fatal error: Python.h: No such file' >&2; exit 1")
    monkeypatch.setenv("CXX", "broken")
    line = installation.compiler()
    assert line.status == "fail" and "Python.h" in line.found and "python3-dev" in line.remedy
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler not found" in installation.compiler().found


@pytest.mark.parametrize(
    ("cuda", "hidden", "remedy"),
    [("13.0", None, "newer driver"), (None, None, "CPU build"), ("13.0", "", "unset CUDA_VISIBLE_DEVICES")],
)
def test_gpus_that_torch_can_not_see_are_a_failure_with_the_reason(tools, monkeypatch, cuda, hidden, remedy):
    script(tools, "nvidia-smi", "echo 535.1; echo 535.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (line,) = installation.devices()
    assert line.status == "fail" and "lists 2" in line.found and remedy in line.remedy


def test_gpus_are_listed_with_memory_and_driver(tools, monkeypatch):
    script(tools, "nvidia-smi", "echo 580.65")
    about = namedtuple("About", "name total_memory major minor")
    kinds = [about("H200", 140 * 2**30, 9, 0), about("H200", 140 * 2**30, 9, 0), about("A100", 80 * 2**30, 8, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: kinds[number])
    same = installation.devices()
    assert same[0] == ("GPUs", "ok", "2 x H200 140 GiB (sm_90)", "") and "580.65" in same[-1].found
    assert same[1].name == "bfloat16" and "engine.precision=float32" in same[1].remedy
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert installation.devices()[0].status == "note"


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for machines without GPUs")
def test_gloo_wants_an_interface_that_exists_or_a_name_that_resolves(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    line = installation.collectives()
    assert line.status == "fail" and "nowhere0" in line.found and socket.if_nameindex()[0][1] in line.remedy
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", socket.if_nameindex()[0][1])
    assert installation.collectives().status == "ok"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert installation.collectives() == (
        "collectives", "note", "gloo; host name no-such-host.invalid does not resolve", "set GLOO_SOCKET_IFNAME",
    )  # fmt: skip


def test_the_file_system_of_the_runs(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/home {tmp_path} nfs4 rw 0 0\n/dev/vda / ext4 rw 0 0\n")
    assert "nfs4" in (line := doctor.file_system(tmp_path / "runs", mounts)).found and "shared between hosts" in line.found
    mounts.write_text("/dev/vda / ext4 rw 0 0\n")
    assert "ext4" in (line := doctor.file_system(tmp_path / "not" / "yet", mounts)).found and "local to this host" in line.found


def test_a_clock_that_is_off(tmp_path, monkeypatch):
    assert doctor.clock(tmp_path).status == "ok"
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 30)
    line = doctor.clock(tmp_path)
    assert line.status == "note" and "30 s behind" in line.found and "NTP" in line.remedy


def test_disk_and_shared_memory_limits(tmp_path):
    assert doctor.free_disk(tmp_path, want=1e-6, least=1e-9).status == "ok"
    assert doctor.free_disk(tmp_path, want=1e9, least=1e-9).status == "note"
    assert doctor.free_disk(tmp_path, want=1e9, least=1e9).status == "fail"
    assert doctor.shared_memory(tmp_path, want=1e-6).status == "ok"
    assert "--shm-size" in doctor.shared_memory(tmp_path, want=1e9).remedy
    assert doctor.shared_memory(tmp_path / "absent").status == "fail"
    assert doctor.open_files(want=1).status == "ok" and "ulimit" in doctor.open_files(want=2**40).remedy


def test_busy_cores_are_a_note():
    assert doctor.cores(load=0.9, count=2).status == "ok"
    busy = doctor.cores(load=5.0, count=2)
    assert busy.status == "note" and "2 for this process, load average 5.0" in busy.found and "OMP_NUM_THREADS=1" in busy.remedy


class Health(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_GET(self):
        self.send_response(self.code if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format, *args): ...


def test_mlflow_answers_refuses_is_away_or_is_silent(tmp_path, monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}/")
    assert doctor.tracking(tmp_path).status == "ok"
    monkeypatch.setattr(Health, "code", 403)
    assert "MLFLOW_TRACKING_TOKEN" in doctor.tracking(tmp_path).remedy
    monkeypatch.setattr(Health, "code", 500)
    assert "trilevel sync" in doctor.tracking(tmp_path).remedy
    server.shutdown()
    server.server_close()
    assert "not reachable within" in (line := doctor.tracking(tmp_path)).found and line.status == "note"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "within 0.3 s" in doctor.tracking(tmp_path, timeout=0.3).found
        assert time.monotonic() - started < 5
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert doctor.tracking(tmp_path).status == "ok" and "sqlite" in doctor.tracking(tmp_path).found


# An ssh that runs the command here; what is wrong with a host is in its name.
SSH = f"""
while [ "$1" = "-o" ]; do shift 2; done
export HOST=$1; shift
case $HOST in
  locked*) echo "$HOST: Permission denied (publickey)." >&2; exit 255;;
  bare*) echo "sh: python: not found" >&2; exit 127;;
  late*) export PYTHONPATH={{late}}:{ROOT};;
  early*) export PYTHONPATH={{early}}:{ROOT};;
  older*) export PYTHONPATH={{older}}:{ROOT};;
  away*) sed -e 's#"token": "[^"]*"#"token": "/nowhere"#' | sh -c "$*"; exit;;
  127.0.0.9) sed -E 's#\\["127.0.0.2", [0-9]+\\]#["127.0.0.2", 1]#' | sh -c "$*"; exit;;
esac
exec sh -c "$*"
"""


@pytest.fixture
def hosts(tools: Path, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would be passed on, before what makes these hosts odd
    for name, body in {
        "late": "import time; now = time.time; time.time = lambda: now() - 299",
        "early": "import time; now = time.time; time.time = lambda: now() + 299",
        "older": "import importlib.metadata as m; old = m.version; m.version = lambda n: '0.1' if n == 'timm' else old(n)",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "sitecustomize.py").write_text(body + "\n")
    script(tools, "ssh", SSH.format(**{name: tmp_path / name for name in ("late", "early", "older")}))

    def ask(*names: str) -> dict[str, installation.Finding]:
        path = tmp_path / "hosts"
        path.write_text("# the cluster\n" + "".join(f"{name} slots=8\n" for name in names))
        found = {line.name: line for line in neighbours.check_hosts(path, tmp_path / "runs")}
        assert not (tmp_path / "runs").exists()  # nothing is left behind
        return found

    return ask


def test_hosts_that_agree(hosts):
    found = hosts("127.0.0.1", "localhost")
    assert [line.status for line in found.values()] == ["ok", "ok", "ok"], found
    assert found["localhost"].found == "0 GPU(s), same libraries and code, clock, run directory"
    assert found["ports"].found == "the hosts reach each other (2 connections tested)"
    assert "ports" not in hosts("127.0.0.1")


def test_a_blocked_connection_between_two_hosts_is_named(hosts):
    """The first host is reached by all: what fails is between the others, in one direction."""
    line = hosts("127.0.0.1", "127.0.0.2", "127.0.0.9")["ports"]
    assert line.status == "fail" and line.found == "127.0.0.9 can't reach 127.0.0.2 ([Errno 111] Connection refused)", line
    assert "open all TCP ports between the hosts" in line.remedy


def test_of_many_hosts_each_tries_a_bounded_number():
    names = [f"node{number}" for number in range(200)]
    for number, name in ((0, "node0"), (100, "node100")):
        tried = [host for host, _ in neighbours._others(name, names, dict.fromkeys(names, 1))]
        assert len(tried) == neighbours.PEERS + (number > 0) and name not in tried and set(tried) >= {names[number + 1]}
        assert number == 0 or "node0" in tried
    few = names[:5]
    pairs = {(one, other) for one in few for other, _ in neighbours._others(one, few, dict.fromkeys(few, 1))}
    assert len(pairs) == 20


def test_each_host_reports_its_own_problems(hosts):
    found = hosts("127.0.0.1", "locked", "bare", "late", "early", "older", "away")
    wanted = {
        "locked": ("Permission denied", "ssh -o BatchMode=yes locked true"),
        "bare": ("not found", "same environment"),
        "late": ("clock is 29", "NTP"),
        "early": ("clock is 29", "NTP"),
        "older": ("different libraries: timm 0.1", "same environment"),
        "away": ("run directory not visible", "runs=DIRECTORY"),
    }
    assert found["127.0.0.1"].status == "ok"
    for host, (found_text, remedy) in wanted.items():
        assert found[host].status == "fail" and found_text in found[host].found and remedy in found[host].remedy, found[host]


def test_an_interface_that_a_host_lacks_is_named(hosts, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    line = hosts("127.0.0.1")["127.0.0.1"]
    assert line.status == "fail" and "no interface nowhere0" in line.found and "GLOO_SOCKET_IFNAME" in line.remedy


def test_an_unreachable_first_host_is_reported_by_the_others(hosts):
    found = hosts("locked", "localhost")
    assert found["ports"] == ("ports", "note", "connectivity to locked was not tested", "fix the failures above first")


def test_different_numbers_of_gpus(hosts, tools):
    script(tools, "nvidia-smi", "echo 'GPU 0: x'; [ $HOST = localhost ] || echo 'GPU 1: x'")
    line = hosts("127.0.0.1", "localhost")["hosts"]
    assert line.status == "fail" and "127.0.0.1 2, localhost 1" in line.found


def test_a_hostfile_without_hosts(tmp_path):
    (tmp_path / "hosts").write_text("# no hosts\n")
    (tmp_path / "option").write_bytes(b"\xef\xbb\xbf-oProxyCommand=x slots=8\r\n")
    for path in (tmp_path / "hosts", tmp_path / "absent", tmp_path / "option"):
        (line,) = neighbours.check_hosts(path, tmp_path)
        assert line.status == "fail" and str(path) in line.found


def test_no_ssh_here(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("node1\n")
    (tmp_path / "true").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    (line,) = neighbours.check_hosts(tmp_path / "hosts", tmp_path)
    assert line.status == "fail" and "openssh" in line.remedy


@pytest.mark.parametrize("count", [1, neighbours.SHOWN, neighbours.SHOWN + 1, neighbours.SHOWN + 5])
def test_unreachable_ports_are_named_up_to_a_number_and_the_rest_is_counted(count: int) -> None:
    names = ["a", "b"]
    found = [{"unreachable": [(f"c{i}", "refused") for i in range(count)]}, {"unreachable": []}]
    finding = neighbours._connectivity(names, found, dict.fromkeys(names, 1234))
    assert finding.name == "ports" and finding.status == "fail"
    assert finding.found.count("a can't reach c") == min(count, neighbours.SHOWN)
    assert finding.found.endswith(f"(refused) and {count - neighbours.SHOWN} more" if count > neighbours.SHOWN else "(refused)")


def test_connections_that_were_tried_are_counted_and_untested_hosts_named() -> None:
    names = ["a", "b", "c"]
    reached = [{"unreachable": []} for _ in names]
    assert (
        neighbours._connectivity(names, reached, dict.fromkeys(names, 1)).found
        == "the hosts reach each other (6 connections tested)"
    )
    closed = neighbours._connectivity(names, reached, {"a": 1, "b": 0, "c": 1})
    assert closed.status == "note" and closed.found == "connectivity to b was not tested"
    assert neighbours._connectivity(["a"], [{"unreachable": []}], {"a": 1}).status == "note", "one host has no other to reach"
