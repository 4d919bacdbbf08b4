"""One run in MLflow. The only importer of mlflow for logging: an upgrade of it touches this file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.credentials import REMEDY
from trainer.config.errors import TrilevelError
from trainer.storage.memory_limit import memory_limit
from trainer.storage.text import listed
from trainer.tracking.metrics import Metric, datasets, param_changes, params, tags
from trainer.tracking.state import STATE, SyncState

ANSWER = 1 << 30  # bytes of memory for the answer of a server, which mlflow reads as a whole
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,255}")  # it becomes the name of a folder


class RunDeleted(TrilevelError, RuntimeError):
    """The run or experiment was deleted in MLflow: a retry won't help."""


NO_MLFLOW = "the answer names no experiment: is this the address of an MLflow server?"


def hint(error: BaseException) -> str:
    """What to do about an error of a server, to be put behind its text."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    if isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError):
        return f"; an answer does not fit into {ANSWER / 2**30:g} GiB: is this the address of an MLflow server?"
    if status in (401, 403) or re.search(r"\b(?:401|403)\b|Unauthorized|Forbidden", str(error)[:300]):
        return f"; {REMEDY}"
    return ""


def load_library() -> None:
    """Import mlflow, which takes seconds."""
    import mlflow.entities
    import mlflow.exceptions
    import mlflow.tracking  # noqa: F401


class Store:
    """Requests about one run, each bounded by `timeout`. Every failure raises; RunDeleted if a retry won't help."""

    def __init__(self, uri: str, runs: Path):
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._uri, self._runs = uri, runs
        with _one_at_a_time(runs) if uri.startswith("sqlite") else contextlib.nullcontext():
            self._client = MlflowClient(tracking_uri=uri)  # creates the tables of a new sqlite file, which takes seconds

    def find_or_make(self, experiment: str, name: str, key: str, began: float, parent: str | None = None) -> tuple[str, str]:
        """(experiment id, run id) of the run tagged with `key`, created if missing, as a child of the run named `parent`.

        experiment, name: of the run.
        key: identifies the run; equal in all requests for it.
        began: start time, seconds since 1970.
        parent: name of the parent run, created if missing; None: no parent.
        """
        found = self._client.get_experiment_by_name(experiment)
        if found is not None and not found.experiment_id:
            raise ConnectionError(NO_MLFLOW)
        if found is not None and found.lifecycle_stage == "deleted":
            raise RunDeleted(
                f"experiment {experiment!r} was deleted in MLflow: restore it, or set tracking.experiment to another name"
            )
        if found is None:
            local = None if self._uri.startswith(("http", "databricks")) else (self._runs / "mlflow-artifacts").as_uri()
            place = self._client.create_experiment(experiment, artifact_location=local)
        else:
            place = found.experiment_id
        mine = f"tags.trilevel_key = '{key}'"
        if not self._client.search_runs([place], mine):
            self._client.create_run(
                place, int(began * 1000), {"trilevel_key": key, "mlflow.source.name": "trilevel train"}, name
            )
        first, *others = sorted(self._client.search_runs([place], mine), key=lambda run: run.info.run_id)
        for other in others:  # a request timed out here but the server completed it
            self._client.delete_run(other.info.run_id)
        if parent is not None:
            self._client.set_tag(first.info.run_id, "mlflow.parentRunId", self._parent(place, parent))
        return place, first.info.run_id

    def _parent(self, place: str, name: str) -> str:
        """Run id of the parent of that name: the first one created, if two children created one at the same time."""
        mine = f"tags.trilevel_parent = '{name}'"
        if not self._client.search_runs([place], mine):
            made = self._client.create_run(place, None, {"trilevel_parent": name, "mlflow.source.name": "launch sweep"}, name)
            self._client.set_terminated(made.info.run_id)  # it computes nothing itself
        return min(self._client.search_runs([place], mine), key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id

    def last_steps(self, run_id: str) -> dict[str, int]:
        """{metric: its highest step in MLflow}, in one request."""
        return {metric.key: metric.step for metric in self._run(run_id).data.to_proto().metrics}

    def begin(self, run_id: str, line: dict[str, Any], directory: Path) -> None:
        """An attempt starts: send parameters, tags, data sets; set the run's status to RUNNING. May be repeated."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        run, want = self._run(run_id), params(line.get("config") or {})
        wanted = tags(line) | {"run_directory": str(directory)}
        if line.get("attempt", 0):
            wanted |= param_changes(run.data.params, want, run.data.tags, line["attempt"])
        new = [Param(k, v) for k, v in want.items() if k not in run.data.params]
        for i in range(0, len(new), 100):
            self._client.log_batch(run_id, params=new[i : i + 100])
        new = [RunTag(k, v) for k, v in wanted.items()]
        for i in range(0, len(new), 100):
            self._client.log_batch(run_id, tags=new[i : i + 100])
        inputs = [
            DatasetInput(
                Dataset(
                    data["name"], data["digest"], "webdataset", json.dumps(data["source"]), None, json.dumps(data["profile"])
                ),
                [InputTag("mlflow.data.context", data["context"])],
            )
            for data in datasets(line)
        ]
        if inputs:
            self._client.log_inputs(run_id, inputs)
        self._client.update_run(run_id, status="RUNNING")

    def send(self, run_id: str, batch: list[Metric]) -> list[Metric]:
        """Send metrics in one request; returns those that MLflow rejects as invalid: one bad value must not block the rest."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        try:
            if batch:
                self._client.log_batch(run_id, metrics=[Metric(m.key, m.value, m.time, m.step) for m in batch])
            return []
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                raise
        self._run(run_id)  # raises if the run itself is the problem
        if len(batch) == 1:
            return batch
        half = len(batch) // 2
        return self.send(run_id, batch[:half]) + self.send(run_id, batch[half:])

    def upload(self, run_id: str, path: Path, folder: str = ".") -> None:
        self._client.log_artifact(run_id, str(path), None if folder == "." else folder)
        if path.name == "report.md":  # shown as the description of the run
            self._client.set_tag(run_id, "mlflow.note.content", path.read_text()[:5000])

    def end(self, run_id: str, status: str, when: float) -> None:
        self._client.set_terminated(run_id, status, int(when * 1000))

    def _run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            raise RunDeleted(
                f"run {run_id} was deleted in MLflow: delete {STATE} in the run directory to upload the journal to a new run"
            )
        return run


def journals_of(uri: str, experiment: str, into: Path) -> tuple[list[Path], list[str]]:
    """Run directories of an experiment's active runs, and names of those without a journal.

    A run on this machine is read from its directory, another from its journal downloaded under `into`. Raises LookupError for an
    unknown experiment, with the known ones as text; MLflow's own errors after some seconds.
    """
    from mlflow.tracking import MlflowClient

    timeout(30)
    with memory_limit(ANSWER):
        return _journals(MlflowClient(tracking_uri=uri), experiment, into)


def _journals(client: Any, experiment: str, into: Path) -> tuple[list[Path], list[str]]:
    from mlflow.exceptions import MlflowException

    place = client.get_experiment_by_name(experiment)
    if place is None:
        raise LookupError(listed(sorted(other.name for other in client.search_experiments()), 20))
    found, missing, token = [], [], None
    while True:
        page = client.search_runs([place.experiment_id], order_by=["start_time ASC"], max_results=1000, page_token=token)
        for run in page:
            here = Path(run.data.tags.get("run_directory", "/nowhere"))
            # that folder may hold another run by now, or belong to another machine
            if not ((here / "journal.jsonl").is_file() and SyncState.load(here).run_id == run.info.run_id):
                if not _RUN_ID.fullmatch(run.info.run_id):
                    raise ValueError(
                        f"run id {run.info.run_id!r:.80}: not a name of letters and digits; is this an MLflow server?"
                    )
                here = into / run.info.run_id
                here.mkdir(parents=True, exist_ok=True)
                try:
                    client.download_artifacts(run.info.run_id, "journal.jsonl", str(here))
                except (MlflowException, OSError):  # not uploaded yet, or the parent of a sweep
                    with contextlib.suppress(OSError):
                        here.rmdir()
                    if "trilevel_parent" not in run.data.tags:
                        missing.append(str(run.info.run_name or run.info.run_id))
                    continue
            found.append(here)
        if not (token := page.token):
            return found, missing


def timeout(seconds: int | None = None) -> int:
    """Set (if given) and return the timeout of this process's requests in seconds; MLflow reads it at every request."""
    if seconds is not None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(seconds)
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # `sync` retries, after asking MLflow what it received
        os.environ["MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"] = str(max(30, seconds))
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """A lock: two runs that start together must not both create the tables of RUNS/mlflow.db."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
