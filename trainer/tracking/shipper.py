"""The training's side of tracking: starts the process that ships the journal, and at the end waits for it a little.

Nothing here can fail a training or hold it up. The other side is `tracking`; what both know is RUN/mlflow.json.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from trainer.config.schema import TrackingConfig
from trainer.storage.source_tree import python_path
from trainer.tracking.state import LOG, SyncResult, SyncState


def start(directory: Path | str, settings: TrackingConfig, *, every: float = 5.0, linger: float = 60.0) -> Shipper:
    """Start shipping, on rank 0, after the start line of this attempt. Takes milliseconds; never raises for MLflow's sake.

    every: seconds between two looks at the journal. linger: seconds the shipper may live on after this process.
    With `tracking.to: journal` there is nothing to ship and the Shipper is idle.
    """
    directory = Path(directory).resolve()
    if settings.to == "journal":
        return Shipper(directory, None)
    words = ["--follow", "--parent", str(os.getpid()), "--every", str(every), "--linger", str(linger)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    try:
        (directory / LOG).parent.mkdir(parents=True, exist_ok=True)
        with (directory / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer.tracking", str(directory), *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the training, which then says goodbye in order
                env=os.environ | threads | {"PYTHONPATH": python_path()},
            )
    except OSError as error:
        return Shipper(directory, None, f"the shipper did not start: {error}")
    return Shipper(directory, process)


class Shipper:
    """The training's handle on the process that ships."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes] | None, trouble: str = ""):
        self._directory, self.process, self._trouble = directory, process, trouble

    def finish(self, timeout: float = 20.0) -> SyncResult:
        """Say that the journal is complete; wait up to `timeout` seconds for MLflow to have it, less where nobody answers.

        What is left is shipped while the shipper lingers, or by `trilevel sync`. Files made before this call go along.
        """
        if self.process is None:
            return SyncResult(not self._trouble, self._later(self._trouble) if self._trouble else "")
        process, began = self.process, time.monotonic()
        if process.stdin:
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(b"stop\n")
                process.stdin.close()
        while process.poll() is None and (waited := time.monotonic() - began) < timeout:
            if waited > 3 and (SyncState.load(self._directory).trouble or _no_room(self._directory)):
                break
            time.sleep(0.05)
        state = SyncState.load(self._directory)
        if _no_room(self._directory) and process.returncode != 0:  # its trouble could not be noted either
            return SyncResult(
                False, f"MLflow does not have all of the run: no room at {self._directory}; make room, then trilevel sync RUN"
            )
        if process.returncode == 0:
            return SyncResult(True, f"MLflow has all of it ({state.uri})")
        ended = f"the shipper ended with code {process.returncode}, see {self._directory / LOG}"
        return SyncResult(False, self._later(state.trouble or ("it is slow" if process.returncode is None else ended)))

    def _later(self, why: str) -> str:
        return (
            f"MLflow does not have all of the run yet: {why}; the journal has; bring it there: trilevel sync {self._directory}"
        )


def _no_room(directory: Path) -> bool:
    try:
        return os.statvfs(directory).f_bavail == 0
    except OSError:
        return False
