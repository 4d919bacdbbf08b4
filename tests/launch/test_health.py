"""The check of nodes before an attempt: what makes a node unusable, and what an attempt does without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import health, hosts
from launch.hosts import Host
from launch.job import Command, Nodes
from tests.conftest import environment

GOOD: dict[str, Any] = {
    "free": 1 << 40,
    "disk": "",
    "rates": [["H200", 600.0]] * 8,
    "off": 0.0,
    "gpus": "",
    "time": 100.0,
    "before": 99.0,
    "after": 101.0,
}


def test_equal_nodes_are_good() -> None:
    assert health.judge({"a": GOOD, "b": GOOD | {"rates": [["H200", 590.0]] * 8}}, 8) == {}
    assert health.judge({"a": GOOD | {"rates": []}, "b": GOOD | {"rates": []}}, 8) == {}, "a job on CPUs"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rates": [["H200", 600.0]] * 7}, "7 of 8 GPUs visible"),
        ({"rates": []}, "0 of 8 GPUs visible"),
        ({"rates": [], "gpus": "CUDA error: uncorrectable ECC error"}, "GPUs fail: CUDA error: uncorrectable ECC error"),
        ({"rates": [*[["H200", 600.0]] * 7, ["H200", 200.0]]}, "GPU 7 reaches 200 TFLOP/s, others of its kind 600"),
        ({"disk": "/runs: Read-only file system", "free": 5}, "/runs: Read-only file system"),
        ({"free": 1 << 20}, "0.00 GiB free for the run directory, at least 1 are needed"),
        ({"time": 300.0}, "its clock is 199 s off"),
        ({"off": 90.0}, "its clock is 90 s off that of the run directory's file server"),
        ({"time": 20.0}, "its clock is 79 s off"),
        ({"error": "no answer within 120 s"}, "no answer within 120 s"),
    ],
)
def test_what_makes_a_node_unusable(changed: dict[str, Any], reason: str) -> None:
    found = health.judge({"a": GOOD, "b": GOOD | changed, "c": GOOD}, 8)
    assert list(found) == ["b"] and found["b"].startswith(reason)


def test_gpus_are_compared_with_those_of_their_kind() -> None:
    older = GOOD | {"rates": [["A100", 270.0]] * 8}
    assert health.judge({"a": GOOD, "b": older}, 8) == {}
    slow = GOOD | {"rates": [["H200", 330.0]] * 8}
    assert list(health.judge({"a": GOOD, "b": slow}, 8)) == ["b"], "also where half of all GPUs are slow"


def test_a_job_on_gpus_needs_them_where_no_other_node_has_any() -> None:
    bare = GOOD | {"rates": []}
    assert health.judge({"a": bare}, 8) == {} and health.judge({"a": bare}, 8, gpus=True) == {
        "a": "0 of 8 GPUs visible (nvidia-smi, dmesg)"
    }


def test_a_clock_is_not_off_by_the_time_of_the_answer() -> None:
    assert health.judge({"a": GOOD | {"before": 0.0, "after": 110.0}}, 8) == {}


def test_this_node_is_probed_as_a_program(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "launch.health", str(tmp_path / "runs" / "x")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120)
    found = json.loads(done.stdout)
    assert (
        found["disk"] == ""
        and found["free"] > 0
        and found["rates"] == []
        and abs(found["time"] - os.stat(tmp_path).st_mtime) < 600
    )
    assert list(tmp_path.iterdir()) == [], "nothing is left behind, and the run directory is not made"


def test_a_disk_that_takes_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(health.tempfile, "NamedTemporaryFile", refused)
    found = health.probe(tmp_path, rates=False)
    assert health.judge({"a": found}, 0) == {"a": f"{tmp_path}: Read-only file system"}


def test_nodes_answer_or_are_named_with_their_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PATIENCE", 2.0)
    good = json.dumps({key: value for key, value in GOOD.items() if key not in ("before", "after")})
    commands = {
        "a": Command(("echo", f"a line of the shell\n{good}")),
        "b": Command(("sh", "-c", "echo 'Permission denied (publickey).' >&2; exit 255")),
        "c": Command(("sleep", "60")),
        "d": Command(("true",)),
    }
    found = health.ask(commands)
    assert found["a"]["rates"] == [["H200", 600.0]] * 8 and found["a"]["before"] <= found["a"]["after"]
    assert found["b"] == {"error": "exit code 255: Permission denied (publickey)."}
    assert found["c"] == {"error": "no answer within 2 s"} and found["d"] == {"error": "exit code 0: no output"}


@pytest.mark.parametrize(
    ("nodes", "bad", "taken"),
    [
        (Nodes(2, 2), "", "ab"),
        (Nodes(2, 2), "a", "bc"),  # replaced by the next of the file
        (Nodes(2, 2), "abc", ""),
        (Nodes(4, 4), "c", ""),
        (Nodes(2, 4), "c", "abd"),  # elastic: left out
        (Nodes(2, 4), "acd", ""),
        (Nodes(1, 4), "a", "bcd"),  # the first one, which would be the rendezvous
    ],
)
def test_failing_hosts_are_replaced_or_left_out(nodes: Nodes, bad: str, taken: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def ask(some: list[Host]) -> dict[str, str]:
        asked.extend(host.name for host in some)
        return {host.name: "disk full" for host in some if host.name in bad}

    found = hosts.healthy([Host(name) for name in "abcd"], nodes, ask)
    assert "".join(host.name for host in found) == taken
    shown = capsys.readouterr().err
    assert all(f"launch: {name} is left out: disk full" in shown for name in bad if name in asked)
    assert len(asked) == len(set(asked))


def test_hosts_are_asked_in_the_same_folder_and_without_a_terminal() -> None:
    found = hosts.health_checks(
        [Host("me@a")], Path("runs/a b"), "/env/python", Path("/my jobs"), {"PYTHONPATH": "/code"}, "config"
    )
    words = found["me@a"].argv
    assert "-tt" not in words and words[-4:-1] == ("-F", "config", "me@a")
    assert words[-1] == "cd '/my jobs' && exec env TERM=dumb PYTHONPATH=/code /env/python -m launch.health 'runs/a b'"
