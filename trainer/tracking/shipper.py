"""The training's side of tracking: starts the process that uploads the journal, and waits for it a limited time at the end.

Nothing here can fail or delay training. The other side is `sync.follow`; both read RUN/mlflow.json.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from trainer.config.schema_run import TrackingConfig
from trainer.storage.private_file import private
from trainer.storage.source_tree import python_path
from trainer.tracking.state import LOG, SyncResult, SyncState


def start(directory: Path | str, settings: TrackingConfig, *, every: float = 5.0, linger: float = 60.0) -> Shipper:
    """Start the shipper, on rank 0, after the start line of this attempt. Takes milliseconds; MLflow's failures never raise here.

    every: seconds between two checks of the journal. linger: seconds for which the shipper may outlive this process.
    With `tracking.to: journal` nothing is uploaded.
    """
    directory = Path(directory).resolve()
    if settings.to == "journal":
        return Shipper(directory, None)
    words = ["--follow", "--parent", str(os.getpid()), "--every", str(every), "--linger", str(linger)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    try:
        (directory / LOG).parent.mkdir(parents=True, exist_ok=True)
        with open(directory / LOG, "ab", opener=private) as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer.tracking", str(directory), *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must reach the training only, which then ends in order
                env=os.environ | threads | {"PYTHONPATH": python_path()},
            )
    except OSError as error:
        return Shipper(directory, None, f"the shipper did not start: {error}")
    return Shipper(directory, process)


class Shipper:
    """The training's handle on the uploading process."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes] | None, trouble: str = ""):
        self._directory, self.process, self._trouble = directory, process, trouble

    def finish(self, timeout: float = 20.0) -> SyncResult:
        """Tell the shipper that the journal is complete; wait up to `timeout` seconds for the upload, less if MLflow does not answer.

        The rest is uploaded while the shipper lingers, or by `trilevel sync`. Files written before this call are uploaded too.
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
        if _no_room(self._directory) and process.returncode != 0:  # the shipper could not write its error either
            return SyncResult(
                False, f"not all of the run is in MLflow: no disk space at {self._directory}; free some, then trilevel sync RUN"
            )
        if process.returncode == 0:
            return SyncResult(True, f"journal fully uploaded to MLflow at {state.uri}")
        ended = f"the shipper exited with code {process.returncode}, see {self._directory / LOG}"
        slow = f"still uploading after {timeout:g} s"
        return SyncResult(False, self._later(state.trouble or (slow if process.returncode is None else ended)))

    def _later(self, why: str) -> str:
        return f"not all of the run is in MLflow yet: {why}; the journal is complete; to upload it: trilevel sync {self._directory}"


def _no_room(directory: Path) -> bool:
    try:
        return os.statvfs(directory).f_bavail == 0
    except OSError:
        return False
