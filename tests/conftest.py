"""What the tests share: one thread per process, shards of real digits, and real launches of the trainer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--images", help="a folder or tar of real photographs for the tests that want them (imagenet-sample-1000.tar)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
    # the files that start processes take longest: first, so that no core is left alone with one of them at the end
    items.sort(key=lambda item: item.get_closest_marker("dist") is None)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scikit-learn's 1,797 handwritten digits: train-*.tar (1,438) and validation-*.tar (359), with indexes."""
    from trainer.data.shards.pack import pack

    folder = tmp_path_factory.mktemp("digits")
    pack("sklearn:digits", folder, shard_size=20_000, progress=False)
    return folder


@pytest.fixture(scope="session")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run on MLflow's sqlite default; its tests copy it."""
    from tests.support.mlflow_runs import shipped

    return shipped(tmp_path_factory.mktemp("default") / "runs" / "tri")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """The environment of a started process: ours, without the variables of a launcher's rank."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "ACCELERATE_", "SLURM_", "MLFLOW_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        ours.pop(name, None)
    return (
        ours
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "GIT_OPTIONAL_LOCKS": "0",
        }
        | more
    )


def command(world: int, *words: str) -> list[str]:
    """`trilevel WORDS` on `world` processes of this machine."""
    return [sys.executable, *torchrun(world), "-m", "trainer", *words]


def torchrun(world: int) -> list[str]:
    """Words for Python before a script or `-m MODULE` that make it `world` processes. The agent binds a port the system gives it and
    keeps it for the ranks (one chosen here could be another job's by the time it is used); one process needs none."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []


@pytest.fixture
def trilevel(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `trilevel WORDS` for real, in an empty folder: (world, *words, fails=False) -> the ended process."""

    def run(world: int, *words: str, fails: bool = False, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(world, *words), cwd=tmp_path, env=environment(**env), capture_output=True, text=True, timeout=timeout
        )
        assert (done.returncode != 0) == fails, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        return done

    return run


def started(folder: Path, world: int, *words: str) -> subprocess.Popen[str]:
    """`trilevel WORDS` in a process group of its own, to be interrupted."""
    return subprocess.Popen(
        command(world, *words),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Until the condition holds. A condition that takes long (a journal is read) is asked less often: the processes that are waited for
    need the cores."""
    end = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if condition():
            return
        assert time.monotonic() < end, "timed out"
        time.sleep(max(0.02, 3 * (time.monotonic() - began)))


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and everything it started: torchrun's ranks lead sessions of their own."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    psutil.wait_procs(children, timeout=10)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind in the surviving lineage of a run's journal."""
    from trainer.journal.reader import lineage

    return [line for line in lineage(run) if line["kind"] == kind]


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def slow_tests_of(request: pytest.FixtureRequest) -> bool:
    """Whether a slow test of this file is going to run, so that a fixture for all of them need not make what only these read."""
    return any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items)
