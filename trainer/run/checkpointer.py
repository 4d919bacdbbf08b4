"""Saving while training continues: state is gathered on all ranks, copied to host memory of rank 0 and written by a thread.

Training is blocked only by gathering and copying; writing may take until the next save. The cost is host memory on the first
node, kept from save to save: a second copy of weights, optimizer state, EMA and example statistics (350 MB for DeiT-S with AdamW and
EMA). The files are the same as without a thread, and training does not read the copy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sparsity.types import Examples, Selection
from trainer.checkpoint import save_load
from trainer.checkpoint.state import TrainState
from trainer.engine.engine import Engine
from trainer.engine.place_clock import CHECKPOINT
from trainer.engine.replicas import assert_replicas_equal
from trainer.model.ema import Ema
from trainer.run import known_checkpoint
from trainer.run.shutdown import Stop
from trainer.storage.disk import Content, written_bytes
from trainer.storage.host_copies import HostCopies


class SaveRecorder(Protocol):
    """What a save needs of the run's `Recorder`; a benchmark has its own."""

    def sync(self) -> None: ...

    def weights(self, weights: dict[str, Tensor]) -> Content: ...

    def saved(self, state: TrainState, path: Path, blocking: float, seconds: float, weights: Content | None) -> None: ...


class Checkpointer:
    """The checkpoints of one attempt. A failed write requests a stop, so that every rank raises the error from `wait`.

    store: writes one on rank 0, see `save_load.save_checkpoint`. asynchronous: training continues while it writes.
    pruning: state of level 4.
    """

    def __init__(
        self,
        store: Callable[..., Path],
        asynchronous: bool,
        engine: Engine,
        recorder: SaveRecorder,
        stop: Stop,
        ema: Ema,
        examples: Examples,
        pruning: Callable[[], dict[str, Tensor]] = dict,
    ):
        self.store, self.asynchronous, self.engine = store, asynchronous, engine
        self.recorder, self.stop, self.ema, self.examples = recorder, stop, ema, examples
        self.pruning = pruning
        self._copies = HostCopies()
        self._write: AsyncWrite | None = None

    def save(self, state: TrainState, selection: Selection | None, last: bool) -> None:
        """Collective. Returns once the state is copied; with `last`, or without `checkpoint.asynchronous`, once it is on disk. Raises
        EngineError where the ranks have different weights: then nothing is written."""
        with self.engine.heartbeat.clock.within(CHECKPOINT, state.step):
            self._save(state, selection)
            if last or not self.asynchronous:
                self.wait()

    def _save(self, state: TrainState, selection: Selection | None) -> None:
        self.wait()
        assert_replicas_equal(self.engine, self.ema.replicated(), state.step)
        began = time.perf_counter()
        copies = self._copies  # no write is in progress that reads them
        weights, optimizer = self.engine.state.weights(copies), self.engine.state.optimizer_state(copies)
        averages, statistics = self.ema.state_dict(copies), self.examples.state_dict(self.engine.all_gather)
        if self.engine.is_main:
            masks = self.pruning()
            self.recorder.sync()  # journal lines before a checkpoint must be durable before the checkpoint is

            def write() -> tuple[Path, Content]:
                path = self.store(
                    state,
                    weights=weights,
                    optimizer=optimizer,
                    ema=averages,
                    examples=statistics,
                    selection=selection,
                    pruning=masks,
                )
                return path, self.recorder.weights({**weights, **averages})

            self._write = AsyncWrite(state, write, began)

    def poll(self) -> None:
        """After every step, no collective: record a write that has completed; a failed one requests a stop, and `wait` raises it."""
        if self._write is not None and self._write.ended:
            if self._write.failure:
                self.stop.request()
            else:
                self._report(self._write)

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._write is not None and not self._write.ended

    def wait(self) -> None:
        """Collective. Waits for the write in progress, as long as bytes are written. Raises CheckpointError on all ranks if it failed."""
        with self.engine.heartbeat.working(written_bytes):
            failure = self._write.wait() if self._write is not None else ""
        if failure := self.engine.broadcast_object(failure):
            raise save_load.CheckpointError(failure)
        if self._write is not None:
            self._report(self._write)

    def _report(self, write: AsyncWrite) -> None:
        assert write.path is not None
        known_checkpoint.note(write.path)
        self.recorder.saved(write.state, write.path, write.blocking, write.seconds, write.weights)
        self._write = None


class AsyncWrite:
    """One checkpoint being written. blocking: seconds for which it blocked training; seconds: time of writing."""

    def __init__(self, state: TrainState, write: Callable[[], tuple[Path, Content]], began: float):
        self.state, self.failure, self.seconds = state, "", 0.0
        self.path: Path | None = None
        self.weights: Content | None = None
        # not a daemon: if the interpreter exits on another error, it waits for the write to complete
        self._thread = threading.Thread(target=self._run, args=[write], name="checkpoint")
        self._thread.start()
        self.blocking = time.perf_counter() - began

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> str:
        """The error message, or "" if the checkpoint is complete on disk."""
        started = time.perf_counter()
        self._thread.join()
        self.blocking += time.perf_counter() - started
        return self.failure

    def _run(self, write: Callable[[], tuple[Path, Content]]) -> None:
        started = time.perf_counter()
        try:
            self.path, self.weights = write()
        except FileNotFoundError as error:
            self.failure = (
                f"checkpoint at step {self.state.step} could not be written: {error}: was the run directory removed or renamed, or its "
                "file system unmounted? Bring it back, then continue with --resume"
            )
        except OSError as error:
            self.failure = (
                f"checkpoint at step {self.state.step} could not be written: {error}; the previous checkpoint is intact: "
                "free disk space, then resume with --resume"
            )
        except Exception as error:
            self.failure = f"checkpoint at step {self.state.step} could not be written: {type(error).__name__}: {error}"
        self.seconds = time.perf_counter() - started
