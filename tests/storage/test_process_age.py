"""The age of a process: that of `ps`, whatever the clock says."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.storage import process_age

YEAR = 365 * 86400.0


def test_it_is_the_time_since_the_process_began() -> None:
    code = "import time; time.sleep(.5); from trainer.storage.process_age import since_start; print(since_start())"
    code += "; time.sleep(1); print(since_start())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    first, second = map(float, done.stdout.split())
    assert 0.5 <= first <= second - 0.99 and second <= time.monotonic() - began + 0.02  # starttime is in hundredths


@pytest.mark.parametrize("jump", [YEAR, -86400.0])
def test_a_clock_that_is_set_changes_nothing(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    before = process_age.since_start()
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    assert before <= process_age.since_start() < before + 60


def test_without_proc_the_clock_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    by_proc = process_age.since_start()

    def missing(self: Path) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", missing)
    assert process_age.since_start() == pytest.approx(by_proc, abs=5)
