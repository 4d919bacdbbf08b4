"""A stand-in for the trainer that records the signals it gets, for the tests of launching."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

# A trainer that only records what happens to it: {rank}.json when it is up, "heard" for each signal, its own exit code.
TRAINER = """
import json, os, pathlib, signal, subprocess, sys, time
if "--check" in sys.argv:
    pathlib.Path("check.json").write_text(json.dumps({"words": sys.argv[1:], "world": os.environ["TRILEVEL_WORLD"]}))
    sys.exit(2 if "bad=1" in sys.argv else 0)
rank = os.environ.get("RANK", "0")
signals = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda n, _: signals.append(n))
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "loader"])
keys = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS")
about = {"words": sys.argv[1:], "env": {k: os.environ.get(k) for k in keys}}
pathlib.Path("writing" + rank).write_text(json.dumps(about))
os.rename("writing" + rank, rank + ".json")
if "crash=1" in sys.argv:
    worker.kill()
    sys.exit(3 if rank == "1" else 0)
end = time.monotonic() + (60 if "wait=1" in sys.argv else 0)
while not signals and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5)  # a checkpoint takes its time
pathlib.Path(rank + ".heard").write_text(json.dumps({"signals": signals, "loader": worker.poll()}))
worker.kill()
if rank == "0":
    pathlib.Path(os.environ["TRILEVEL_EXIT_FILE"]).write_text("75" if signals else "0")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()  # a namespace package would lose against the real one
    (tmp_path / "trainer" / "__main__.py").write_text(TRAINER)
    (tmp_path / "c.yaml").write_text("name: c\n")
    return tmp_path


def launched(folder: Path, *words: str, command: str = "local", **more: str) -> subprocess.Popen[str]:
    """`python -m launch COMMAND` in `folder`, where `-m trainer` is the one above."""
    env = environment(**more)
    env["PYTHONPATH"] = f"{folder}:{env['PYTHONPATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "launch", command, "c.yaml", *words],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read(path: Path):
    return json.loads(path.read_text())
