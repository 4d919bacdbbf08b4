"""The journal: one JSON line per event in RUN/journal.jsonl, appended, readable after a kill. MLflow, report and compare read it.

Every line has `kind`, `time` (unix seconds; they grow evenly within an attempt even if the clock is set) and `attempt` (0, then one
more at each start of the same run). `step` counts the optimizer steps that lie behind the line; `epoch` and `batch` count from 0;
`progress` is epoch + batch / batches in this epoch. Shares are in [0, 1]. Fields beyond the table may be added: numbers reach MLflow by
name, lists as one metric per position.

| kind       | when                         | fields                                                                           |
|------------|------------------------------|----------------------------------------------------------------------------------|
| start      | first line of every attempt  | config (resolved), world (processes), hosts (list), device (name), launcher,     |
|            |                              | compile_cache (folder of torch.compile's graphs, or nothing),                    |
|            |                              | attention (backend, or {tokens: backend}), attention_ms ({tokens: {backend: ms of|
|            |                              | an attention, forward and backward}}, if measured),                              |
|            |                              | commit, dirty, python, versions {library: version}, parameters (count), pixels   |
|            |                              | (list of the options that change pixels), data {train, validation: {pattern,     |
|            |                              | fingerprint, images, classes}}, multiply_adds (per image, forward, dense model), |
|            |                              | classes (names), matrix_tflops (a device's rate of matrix products, measured),   |
|            |                              | starting (seconds from the start of the process to this line), warnings (list of |
|            |                              | settings that act less than they say, as text, see `run.ineffective`; attention  |
|            |                              | kernels that a resume on another GPU times anew)                                 |
| resume     | later attempts, before any   | epoch, batch, step that the attempt resumes from (step 0: nothing saved), path   |
|            | step                         |                                                                                  |
| epoch      | before the first batch of an | epoch, batch (0, or that of a resume), step, kept (examples), examples (in       |
|            | epoch                        | the data set), steps (batches), leftover (count, or {count, ids} when few),      |
|            |                              | facts {of the selection; hash: its list is RUN/kept/HASH.npz}                    |
| plateau    | the plan changes             | epoch, step, progress, keep_tokens, keep_connections (shares), tokens (list, per |
|            |                              | block), multiply_adds (per image, forward); where steps draw their plan the      |
|            |                              | expectations, and draws: list of [share of the steps, keep_tokens,               |
|            |                              | keep_connections]                                                                |
| control    | the own passes of a plateau  | epoch, step, progress, keep_tokens, keep_connections; where it was measured:     |
|            | were timed beside dense ones | bound_passes (multiply-adds, own / dense), bound (the same with the examples     |
|            | (see `dense_baseline`), or   | left out), measured (time of a pass, own / dense: median; measured_min, _max,    |
|            | could not be                 | pairs), own_ms, dense_ms (passes of a micro-batch), step_ms (real steps),        |
|            |                              | data_wait, passes_share (of the step time), step_speedup (x, a dense step / own),|
|            |                              | run_speedup, run_bound (x, whole run so far against dense on every example),     |
|            |                              | timed (share of the training time these two cover), seconds (of timing); note    |
|            |                              | (overheads as text, or why it was not measured)                                  |
| step       | every `log_every`, and where | epoch, batch, step, progress, loss (nats), lr, grad_norm, images (presented      |
|            | a checkpoint follows         | since the last step line), seconds (of training since then, evaluation and       |
|            |                              | checkpoints left out), images_per_second (all ranks), data_wait (share),         |
|            |                              | keep_tokens, keep_connections (shares), chain (of all batches, see `hash_chain`),|
|            |                              | spent {cause: seconds of this attempt so far, on rank 0, see `place_clock`},     |
|            |                              | phases {phase: {min, median, max over ranks, slowest, slowest_host}} (shares of  |
|            |                              | a sampled step; of one rank the median alone); the rest: see docs/mlflow.md      |
| ranks      | beside a step line, of more  | step; for each phase its share of the sampled step on every rank (list)          |
|            | than one process             |                                                                                  |
| system     | beside a step line, every    | step; for each host {load of the node, in MLflow's names of system metrics}      |
|            | 10 s at most                 |                                                                                  |
| eval       | after an evaluation          | epoch, step, progress, top1, top5, worst_class (shares), loss, images, seconds,  |
|            |                              | ema (bool: weights of the moving average), per_class (accuracy of every class)   |
| density    | beside an eval line, for     | as eval, at keep_tokens                                                          |
|            | each of evaluate.densities   |                                                                                  |
| weights    | at the start of an epoch, if | epoch, step, progress, event (updated: the penalty; pruned: at `prune`; or ""),  |
|            | level 4 is on                | kept (share of the pruned layers' elements), layers {layer: kept}, layer_bytes   |
|            |                              | {layer: bytes, as blocks; dense before they are pruned}, bytes (of               |
|            |                              | these layers: {dense, block, csr}), multiply_adds (per image, every token, of    |
|            |                              | kept ones), norms {low, median, high: 10, 50, 90 % of the groups, relative to  |
|            |                              | their layer}, weak (share of the groups below .1)                                |
| checkpoint | after it is on disk, which   | epoch, batch, step, path, bytes, blocking (seconds for which it blocked          |
|            | may be steps later           | training), seconds (of writing; in background with `checkpoint.asynchronous`)    |
| broken     | an image could not be used   | epoch, batch, step, id, name, reason                                             |
| skipped    | a step was skipped: its      | epoch, batch (of the step itself), step (as `replay` counts), digest (of         |
|            | gradient was not finite      | the batch, see `hash_chain`), skipped, in_row (steps so far)                     |
| message    | a message to the user        | text                                                                             |
| end        | last line of an attempt that | status ("finished"; "stopped" by a signal or `stop_at`, with a checkpoint;       |
|            | ends by itself               | "failed"), reason, step, progress, seconds, images (of the run), device_hours    |
|            |                              | (of all attempts), weights_bytes (of the whole network in float32, of pruned     |
|            |                              | layers what is left, with indices), goodput, energy_kwh, run_speedup, run_bound, |
|            |                              | timed (as in `control`), spent, by_cause {cause: seconds over all attempts, see  |
|            |                              | `goodput`}, paused (seconds between attempts after a stop, outside by_cause),    |
|            |                              | starting, world (of an attempt that failed before its start line), matrix_tflops |
|            |                              | (of rank 0's device, measured again), with engine.compile graphs (of rank 0)     |

Non-finite numbers are the strings "NaN", "Infinity", "-Infinity" (JSON has no such numbers); readers return floats.
"""

from __future__ import annotations

import errno
import json
import os
import time
import weakref
from pathlib import Path
from typing import Any

from trainer.journal.file import JournalError, lock, plain, repair
from trainer.journal.reader import FILE, last_attempt
from trainer.storage.private_file import regular
from trainer.storage.standard_streams import say

DURABLE = frozenset({"start", "resume", "checkpoint", "end"})  # synced to disk when `write` returns
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)  # errors that may be temporary: disk full, file system away
UNWRITABLE = (
    errno.EROFS,
    errno.EPERM,
    errno.EACCES,
    errno.ESTALE,
)  # read-only since a fault of the disk, chattr +i, NFS server restarted
PENDING_BYTES = 16 << 20  # bytes kept in memory while the disk is full; with more, the run stops

_open: weakref.WeakSet[Journal] = weakref.WeakSet()


class Journal:
    """The only writer of a run's journal. When `write` returns, the line is complete in the file, or in memory while the disk is full.

    `attempt` None: one more than the last in the file (a checkpoint does not know attempts that saved nothing).
    Raises JournalError if another process is writing the same journal.
    """

    def __init__(self, directory: Path | str, attempt: int | None = None):
        self.path = Path(directory) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = time.time() - time.monotonic()  # a clock that is set meanwhile changes no duration in the journal
        try:
            self._file = regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror}; move it away, or start another run by name=OTHER") from error
        self._pending = b""
        self._warned = self._unsafe = False
        try:
            lock(self._file, self.path)
            self._size = repair(self._file)
            last = last_attempt(directory)
            if attempt is not None and attempt <= last:
                raise JournalError(f"{self.path}: attempt {attempt} exists already (the last one is {last}); omit `attempt`")
        except BaseException:
            self.close()
            raise
        self.attempt = last + 1 if attempt is None else attempt
        _open.add(self)

    def now(self) -> float:
        """The time of a line that is written now, in unix seconds."""
        return round(self._clock + time.monotonic(), 6)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line, in microseconds but for the durable kinds. Raises for a full disk once PENDING_BYTES are held."""
        line = {"kind": kind, "time": self.now(), "attempt": self.attempt} | fields
        self._pending += json.dumps(plain(line), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self._flush()
        if kind in DURABLE:
            self.sync()

    def sync(self) -> None:
        """Sync all lines to disk; called before a checkpoint becomes the latest, so that a crash of the node then loses no line.

        If that fails (NFS reports a full quota here, not at the write), the run continues, with one warning. Raises JournalError if the
        file was removed or renamed: lines would go on into a file without a name, and checkpoints into a new directory without a journal.
        """
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            there = False
        if not there:
            raise JournalError(
                f"{self.path}: removed, renamed or replaced while this run writes to it; put the run directory back and continue with "
                "--resume, or start another run by name=OTHER"
            )
        if self._pending:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            if error.errno not in DISK:
                raise self._named(error) from None
            if not self._unsafe:
                say(f"{self.path}: {error.strerror}; a crash of this node may now lose the last lines", error=True)
            self._unsafe = True
        else:
            self._unsafe = False

    def close(self) -> None:
        if self._file >= 0:
            if self._pending:
                self._flush()
            if self._pending:
                lost = self._pending.count(b"\n")
                say(f"{self.path}: the disk is still full; its last {lost} line(s) are lost", error=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _named(self, error: OSError) -> OSError | JournalError:
        """The error with the file and a remedy, where the file system has become unwritable; any other as it is."""
        if error.errno not in UNWRITABLE:
            return error
        return JournalError(
            f"{self.path}: {error.strerror}: the journal can't be written any more; make the file and its file system writable, then "
            "continue with --resume"
        )

    def _flush(self) -> None:
        try:
            written = 0
            while written < len(self._pending):
                written += os.write(self._file, self._pending[written:])
        except OSError as error:
            if error.errno not in DISK:
                raise self._named(error) from None
            os.ftruncate(self._file, self._size)  # no partial line; all is retried with the next line
            if len(self._pending) > PENDING_BYTES:
                raise JournalError(
                    f"{self.path}: {error.strerror} for {len(self._pending)} bytes in memory: free disk space, then resume with --resume"
                ) from error
            if not self._warned:
                say(f"{self.path}: {error.strerror}; lines are held in memory until the disk has free space", error=True)
                self._warned = True
            return
        self._size += len(self._pending)
        self._pending, self._warned = b"", False


def _forget_in_child() -> None:
    """A forked worker must not hold the lock of a parent that has exited, nor write to its journal."""
    for journal in list(_open):
        journal._pending = b""
        journal.close()


os.register_at_fork(after_in_child=_forget_in_child)
