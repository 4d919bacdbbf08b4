"""Saving while training goes on: gathered on all ranks, copied into the memory of rank 0, written there by a thread.

Training stands still for the gathering and the copy alone; the disk has until the next save. The copy is the whole price: weights,
optimizer, average and example statistics once more in the memory of the first node (for DeiT-S under AdamW with an average 350 MB)
until they are written. What is written is the same as without a thread, and the training that goes on reads nothing of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from sparsity.types import Examples, Selection
from trainer.checkpoint import save_load
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.engine.engine import Engine
from trainer.model.ema import Ema
from trainer.run.recorder import Recorder
from trainer.run.shutdown import Stop


class Checkpointer:
    """The checkpoints of one attempt. A write that failed asks the run to stop, so that every rank raises it from `wait`."""

    def __init__(
        self, config: Config, engine: Engine, recorder: Recorder, stop: Stop, fingerprint: str, ema: Ema, examples: Examples
    ):
        self.config, self.engine, self.recorder, self.stop = config, engine, recorder, stop
        self.fingerprint, self.ema, self.examples = fingerprint, ema, examples
        self._write: AsyncWrite | None = None

    def save(self, state: TrainState, selection: Selection | None, last: bool) -> None:
        """Collective. Returns when the state is copied; when it is on the disk if `last`, or without `checkpoint.asynchronous`."""
        self.wait()
        began = time.perf_counter()
        weights, optimizer = self.engine.state.weights(), self.engine.state.optimizer_state()
        averages, statistics = self.ema.state_dict(), self.examples.state_dict(self.engine.all_gather)
        if self.engine.is_main:
            self.recorder.sync()  # the lines before a checkpoint are at least as durable as it is

            def write() -> Path:
                path = save_load.save_checkpoint(
                    self.recorder.checkpoints, state, self.config, self.fingerprint,
                    weights=weights, optimizer=optimizer, ema=averages, examples=statistics, selection=selection,
                )  # fmt: skip
                self.recorder.weights({**weights, **averages})
                return path

            self._write = AsyncWrite(state, write, began)
        if last or not self.config.checkpoint.asynchronous:
            self.wait()

    def poll(self) -> None:
        """After every step, no collective: tell what became durable meanwhile; a failure is raised by the `wait` it leads to."""
        if self._write is not None and self._write.ended:
            if self._write.failure:
                self.stop.request()
            else:
                self._tell(self._write)

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._write is not None and not self._write.ended

    def wait(self) -> None:
        """Collective. Until nothing is being written. Raises CheckpointError on all ranks where that failed."""
        failure = self._write.wait() if self._write is not None else ""
        if failure := self.engine.broadcast_object(failure):
            raise save_load.CheckpointError(failure)
        if self._write is not None:
            self._tell(self._write)

    def _tell(self, write: AsyncWrite) -> None:
        assert write.path is not None
        self.recorder.saved(write.state, write.path, write.blocking, write.seconds)
        self._write = None


class AsyncWrite:
    """One checkpoint on its way to the disk. blocking: seconds that training stood still for it; seconds: of writing."""

    def __init__(self, state: TrainState, write: Callable[[], Path], began: float):
        self.state, self.failure, self.seconds = state, "", 0.0
        self.path: Path | None = None
        # not a daemon: an interpreter that ends over another error lets it finish, and so keeps what is nearly saved
        self._thread = threading.Thread(target=self._run, args=[write], name="checkpoint")
        self._thread.start()
        self.blocking = time.perf_counter() - began

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> str:
        """The failure, or "" where the checkpoint is whole on the disk."""
        started = time.perf_counter()
        self._thread.join()
        self.blocking += time.perf_counter() - started
        return self.failure

    def _run(self, write: Callable[[], Path]) -> None:
        started = time.perf_counter()
        try:
            self.path = write()
        except OSError as error:
            self.failure = (
                f"checkpoint at step {self.state.step} could not be written: {error}; the one before is whole: make room, "
                "then --resume"
            )
        except Exception as error:
            self.failure = f"checkpoint at step {self.state.step} could not be written: {type(error).__name__}: {error}"
        self.seconds = time.perf_counter() - started
