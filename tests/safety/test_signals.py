"""SIGTERM and Ctrl-C end every command within seconds, whatever is still queued and whatever a server or a host does not answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

COMMANDS = (
    "pack", "index", "verify", "eval", "bench", "audit", "report", "compare", "compare --experiment", "export", "sync", "doctor",
)  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, float]]:
    """{"COMMAND SIGNAL": (exit status, seconds from the signal to the end)}"""
    words = [sys.executable, str(ROOT / "tests" / "support" / "jobs" / "signalled_commands.py")]
    folder = tmp_path_factory.mktemp("signals")
    done = subprocess.run([*words, str(folder)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_the_command(command: str, ended: dict[str, tuple[int, float]]) -> None:
    status, seconds = ended[f"{command} SIGINT"]
    assert status == 130 and seconds < 10, "Ctrl-C"
    status, seconds = ended[f"{command} SIGTERM"]
    assert status == -signal.SIGTERM and seconds < 10
