"""Uploads the journal of one run to MLflow, a batch at a time. Retries are in `sync`."""

from __future__ import annotations

import contextlib
import math
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.config.schema_run import TrackingConfig
from trainer.journal import writer
from trainer.journal.reader import FILE, read, read_from
from trainer.tracking.address import Address, address_of, from_environment
from trainer.tracking.metrics import STATUS, Metric, metrics
from trainer.tracking.mlflow_client import Store, hint
from trainer.tracking.state import SyncState

BATCH = 800  # metrics per request; MLflow takes 1000
FIRST = ("config.yaml", "source.txt", "environment.txt", "plan.md")  # as soon as a run begins
FILES = (*FIRST, "report.md", "report.png", "journal.jsonl")
FORGOTTEN = 15 * 60  # seconds without a line after which `sync` calls a run without an end line killed


def where(directory: Path, uri: str | None = None) -> Address:
    """Where a run goes: tracking.uri, else MLFLOW_TRACKING_URI, else the server it went to before (a shell without that variable must
    not ship it a second time), else sqlite beside the run directories (RUNS/mlflow.db)."""
    if uri:
        return address_of(uri)
    if (given := from_environment()) is not None:
        return given
    before = SyncState.load(directory).uri
    server = before if before.startswith(("http", "databricks")) else ""
    return address_of(server or f"sqlite:///{directory.resolve().parent}/mlflow.db")


class JournalUploader:
    """Uploads the journal of one run, a batch at a time. With a different tracking URI than before, uploads all of it again."""

    def __init__(self, directory: Path):
        starts, last = [], {}
        for last in read(directory):
            if last["kind"] == "start":
                starts.append(last)
        if not starts:
            raise writer.JournalError(
                f"{directory / FILE}: no start line yet, which has the tracking URI; wait until the run has started"
            )
        config = starts[-1].get("config") or {}
        about = dict(config.get("tracking") or {})
        self.address = where(directory, about.pop("uri", None))  # a journal of an earlier version may have a password in it
        try:
            settings = TrackingConfig.model_validate(about)
        except ValueError as error:
            raise writer.JournalError(f"{directory / FILE}: `tracking` in its last start line is not valid: {error}") from error
        self.directory, self.uri, self._weights = directory, self.address.uri, settings.weights
        self._experiment, self._parent = settings.experiment, settings.parent
        self._name, self._began = str(config.get("name") or directory.name), starts[0]["time"]
        self.state = SyncState.load(directory)
        if self.state.uri.rstrip("/") != self.uri:
            self.state = SyncState(uri=self.uri)
        self._store: Store | None = None
        self._steps_known = False  # whether state.last is what MLflow has; not while a request is in progress
        self._when = last["time"]
        self._left_out: set[str] = set()  # names that were reported

    @property
    def size(self) -> int:
        return (self.directory / FILE).stat().st_size

    def send_batch(self, limit: float = math.inf) -> bool:
        """Send the next lines: a full batch, or up to a start or end line, none after byte `limit`. False if there are none."""
        state = self.state
        if state.offset >= min(limit, self.size):
            return False
        store = self._ready()
        batch: list[Metric] = []
        offset, step, last, mark = state.offset, state.step, dict(state.last), None
        for behind, line in read_from(self.directory, state.offset):
            special = line["kind"] in ("start", "end")
            if behind > limit or len(batch) >= BATCH or (special and offset > state.offset):
                break
            step = line["step"] if isinstance(line.get("step"), int) else step
            for metric in metrics(line, step):
                if metric.step > last.get(metric.key, -1):
                    last[metric.key] = metric.step
                    batch.append(metric)
            offset, self._when = behind, line["time"]
            if special:
                mark = line
                break
        if offset == state.offset:
            return False
        self._steps_known = False
        refused = store.send(state.run_id, batch)
        if mark and mark["kind"] == "start":
            store.begin(state.run_id, mark, self.directory)
            state.ended = False
        elif mark:
            store.end(state.run_id, STATUS.get(str(mark.get("status")), "FAILED"), mark["time"])
            state.ended = True
        self._steps_known = True
        state.offset, state.step, state.last, state.trouble = offset, step, last, ""
        state.refused += len(refused)
        for metric in refused[:3]:
            print(f"MLflow rejected {metric}", flush=True)
        self._note()
        return True

    def upload(self, first: bool = False) -> None:
        """The run's files that are new or changed since they were sent; first: only those that are there from the start."""
        fresh = self._fresh(first)
        for path, name, seen in fresh:
            self._ready().upload(self.state.run_id, path, str(Path(name).parent))
            self.state.uploaded[name] = seen
        if fresh or self.state.trouble:
            self.state.trouble = ""
            self._note()

    def fresh_bytes(self) -> int:
        """Of the files that `upload` would send now."""
        return sum(seen[0] for _, _, seen in self._fresh(first=False))

    def _fresh(self, first: bool) -> list[tuple[Path, str, list[int]]]:
        """The files that are new or changed since they were sent: path, name in the run, [bytes, time]."""
        fresh = []
        for path in self._files(first):
            with contextlib.suppress(OSError):
                facts, name = path.lstat(), str(path.relative_to(self.directory))
                if not stat.S_ISREG(facts.st_mode):  # a link in another person's run would send a file of this user
                    self._leave_out(name)
                    continue
                seen = [facts.st_size, facts.st_mtime_ns]
                if self.state.uploaded.get(name) != seen:
                    fresh.append((path, name, seen))
        return fresh

    def _leave_out(self, name: str) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            print(f"{self.directory / name}: not uploaded, because it is a link or no regular file", flush=True)

    def mark_killed(self, by_hand: bool) -> None:
        """After all lines are sent: a run without an end line was killed (by hand: only if its last line is old)."""
        if not self.state.ended and (not by_hand or time.time() - self._when > FORGOTTEN):
            self._ready().end(self.state.run_id, "KILLED", self._when)

    def failed(self, error: BaseException) -> None:
        """Note the trouble and say it, once."""
        reason = self.address.redacted(" ".join(str(error).split()))[:300]
        text = f"{self.uri}: {type(error).__name__}: {reason}{hint(error)}"
        if text != self.state.trouble:
            print(time.strftime("%F %T"), text, flush=True)
        self.state.trouble = text
        self._note()

    def _note(self) -> None:
        """Save the state; on a full disk it stays old, and the next shipper asks MLflow, see `_ready`."""
        with contextlib.suppress(OSError):
            self.state.save(self.directory)

    def _files(self, first: bool) -> Iterator[Path]:
        yield from (self.directory / name for name in (FIRST if first else FILES))
        if not first:
            if (traces := self.directory / "traces").is_symlink():
                self._leave_out("traces")
            else:
                yield from sorted(traces.glob("*"))
            if self._weights:
                yield self.directory / "weights.safetensors"

    def _ready(self) -> Store:
        state = self.state
        if self._store is None:
            self._store = Store(self.address.opened, self.directory.parent)
        if not state.run_id:
            state.save(self.directory)  # save the key first: it finds a run that was created but not recorded
            place, run = self._store.find_or_make(self._experiment, self._name, state.key, self._began, self._parent)
            state.experiment_id, state.run_id = place, run
            self._note()
        if not self._steps_known:
            for key, step in self._store.last_steps(state.run_id).items():
                state.last[key] = max(step, state.last.get(key, -1))
            self._steps_known = True
        return self._store
