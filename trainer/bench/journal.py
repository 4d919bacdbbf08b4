"""`trilevel bench journal`: time of a logging step in training, with the MLflow server stopped, unresponsive and running.

A logging step is the work of rank 0 at a log line: reduce the meters, write the line, show it. Meanwhile the real shipper, in its
own process, uploads to a server that refuses connections (stopped), accepts requests and never answers (silent: the worst case),
or works (running: a real `mlflow server` on sqlite, started here). `alone` has no shipper: the cost of the journal itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from sparsity.types import Observation
from trainer.bench.result import BenchResult, stats
from trainer.config.schema_run import TrackingConfig
from trainer.data.progress import tracked
from trainer.engine.processes import Processes
from trainer.journal.writer import Journal
from trainer.run.console import Console
from trainer.telemetry.efficiency import Efficiency
from trainer.telemetry.meters import Meters
from trainer.tracking.shipper import start
from trainer.tracking.state import SyncState

STATES = ("alone", "stopped", "silent", "running")
STEP, EVERY = 0.05, 20  # s of a training step, and steps per log line (the default), for the column `share`
MIB = 2**20
COLUMNS = {
    "ms": "{median:.3f}",
    "p99": "{p99:.3f}",
    "max": "{max:.3f}",
    "share": "{share:.3%}",
    "cpu ms": "{cpu:.3f}",
    "cpu p99": "{cpu_p99:.3f}",
    "cpu share": "{cpu_share:.3%}",
    "training MiB": "{memory_mib[0]:.0f} -> {memory_mib[1]:.0f}",
    "shipper MiB": "{shipper_mib[0]:.0f} -> {shipper_mib[1]:.0f}",
    "sent": "{sent:.0%}",
}


def bench(lines: int = 2000, pause: float = 0.02, states: tuple[str, ...] = STATES) -> BenchResult:
    """Rows {state of the server: {median, p99, min, max (ms of a logging step), unit, share (mean / STEP x EVERY), cpu, cpu_p99 (ms
    of CPU time: mean, 99th percentile), cpu_share, memory_mib, shipper_mib: [after a quarter of the lines, after all], sent
    (share of the journal's bytes)}}.

    pause: s between two log lines. On a machine with other work only the CPU time is meaningful.
    """
    title = f"time of a logging step by state of the MLflow server; share: of {EVERY} steps of {1000 * STEP:g} ms"
    return BenchResult(title, {state: _measured(state, lines, pause) for state in states}, COLUMNS)


def _measured(state: str, lines: int, pause: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, _server(state, Path(folder)) as uri, open(os.devnull, "w") as nowhere:
        run = Path(folder) / "runs" / state
        settings = TrackingConfig(to="journal" if state == "alone" else "mlflow", uri=uri)
        with Journal(run) as journal, Console(state, until=lines, file=nowhere) as console:
            journal.write("start", config={"name": state, "tracking": settings.model_dump()}, world=1)
            shipper = start(run, settings, every=0.5, linger=0.0)
            meters, efficiency = Meters(Processes()), Efficiency(run, 0, 1, 0.0, 1e12)  # pyright: ignore[reportArgumentType]
            efficiency.cost = {"tokens": [197] * 12, "multiply_adds": 4.6e9}
            took, cpu, own, other = [], [], [], []
            for number in tracked(range(lines), f"bench journal, server {state}", lines, "lines"):
                _step(meters)
                began, busy = time.perf_counter(), time.thread_time()
                window = meters.reduce()
                line = (
                    {"step": number + 1, "progress": float(number), "lr": 1e-3}
                    | window.facts
                    | efficiency.of(window, {"training": 1.0})
                )
                journal.write("step", **line)
                console.step(**line)
                cpu.append(1000 * (time.thread_time() - busy))
                took.append(1000 * (time.perf_counter() - began))
                if number in (lines // 4, lines - 1):
                    own.append(psutil.Process().memory_info().rss / MIB)
                    other += [] if shipper.process is None else [_resident(shipper.process)]
                time.sleep(pause)
            sent = SyncState.load(run).offset / journal.path.stat().st_size
            if shipper.process is not None:
                shipper.process.kill()
                shipper.process.wait()
    return stats(took, "ms") | {
        "p99": float(np.percentile(took, 99)),
        "share": float(np.mean(took)) / 1000 / (STEP * EVERY), "cpu": float(np.mean(cpu)), "cpu_p99": float(np.percentile(cpu, 99)),
        "cpu_share": float(np.mean(cpu)) / 1000 / (STEP * EVERY), "memory_mib": own, "shipper_mib": other, "sent": sent,
    }  # fmt: skip


def _step(meters: Meters) -> None:
    right = torch.ones(8, dtype=torch.bool)
    meters.add(torch.ones(8), torch.ones(8), Observation(right, torch.ones(8), torch.zeros(8), right))
    for _ in range(2):  # the second one is sampled
        for phase in ("rest", "host_to_device", "forward", "backward", "optimizer"):
            meters.end_phase(phase)
        meters.end_step(8, [], 0.0)


def _resident(process: subprocess.Popen[bytes]) -> float:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).memory_info().rss / MIB
    return float("nan")


@contextlib.contextmanager
def _server(state: str, folder: Path) -> Iterator[str]:
    """The address of an MLflow server in the given state."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        if state == "silent":
            server.listen(128)  # accepts connections, never reads them
            yield uri
            return
    if state != "running":
        yield uri
        return
    words = ["--backend-store-uri", f"sqlite:///{folder}/bench.db", "--artifacts-destination", str(folder / "served")]
    words += ["--host", "127.0.0.1", "--port", uri.rpartition(":")[2], "--workers", "1"]
    with open(os.devnull, "wb") as nowhere:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words], stdout=nowhere, stderr=nowhere, start_new_session=True
        )
    try:
        _wait(uri)
        yield uri
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def _wait(uri: str, patience: float = 120.0) -> None:
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"mlflow server at {uri} did not start within {patience:g} s; run `mlflow server` by hand to see why")
