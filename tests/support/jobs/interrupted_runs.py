"""Runs that are interrupted at chosen points and resumed, one after the other in the same processes: interrupted_runs.py CONFIG SCENE ...

A scene stops this process (a signal to itself) at the place in its name, on one rank only: the others must agree. Each becomes the
run directory runs/SCENE; "whole" is never interrupted, nor is "zeroN", which trains with that stage.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch._dynamo.callback import callback_handler

import trainer.checkpoint.save_load
import trainer.data.loader.build
import trainer.run.assembly
import trainer.train
from trainer.config.load import load
from trainer.data.batch import Batch
from trainer.data.loader.validation import Validation
from trainer.engine.engine import Engine
from trainer.run.recorder import Recorder
from trainer.run.shutdown import end_process
from trainer.storage.disk import Disk

RANK, LAST = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1


def hear(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


class Interrupted(Validation):
    """Sends the signal on the last rank, before the second batch of the fourth pass: the average's, in the second epoch."""

    passes = 0

    def __iter__(self) -> Iterator[Batch]:
        Interrupted.passes += 1
        for number, batch in enumerate(super().__iter__()):
            if Interrupted.passes == 4 and number == 1 and RANK == LAST:
                hear()
            yield batch


class Hearing(Disk):
    """Sends the signal twice while a checkpoint is being written, and blocks the writing until training has noticed it."""

    heard, passed = threading.Event(), threading.Event()

    def rename(self, old: Path, new: Path) -> None:
        if new.name == "step-00000005" and not self.heard.is_set():
            hear(signal.SIGUSR1), hear(signal.SIGUSR2)
            Hearing.heard.set()
            assert self.passed.wait(60), "training continues during the writing"
        super().rename(old, new)


class Telling(Recorder):
    """Lets the disk above continue after a step that follows the checkpoint."""

    def step(self, *words: Any, **facts: Any) -> Any:
        state = super().step(*words, **facts)
        if Hearing.heard.is_set():
            Hearing.passed.set()
        return state


class Full(Disk):
    """No free space for the second checkpoint."""

    def sync(self, folder: Path) -> None:
        if "step-00000006" in folder.name:
            raise OSError(28, "No space left on device")
        super().sync(folder)


class Waiting(Recorder):
    """The seventh step ends when that failure is known: then two more steps, and not a third, may be made."""

    def step(self, state: Any, *words: Any, **facts: Any) -> Any:
        for thread in threading.enumerate():
            if thread.name == "checkpoint" and state.step == 7:
                thread.join()
        return super().step(state, *words, **facts)


def at_step(engine: Engine, *words: Any) -> Any:
    if words[1] == 4 and RANK == 0:
        hear()
    return reseed(engine, *words)


reseed = Engine.reseed


def one(name: str, resume: bool, *overrides: str) -> str:
    try:
        reported = trainer.train.train(load(sys.argv[1], [f"name={name}", *overrides]), resume=resume).status
    except trainer.checkpoint.save_load.CheckpointError as error:
        reported = str(error)
    AcceleratorState._reset_state(reset_partial_state=True)  # the process group stays
    if RANK == 0:
        print(f"reported {name}: {reported}", flush=True)
    return reported


def once(act: Callable[[], None]) -> Callable[[Any], None]:
    left = [act]
    return lambda _: left.pop()() if left else None


for scene in sys.argv[2:]:
    if scene == "whole" or scene.startswith("zero"):
        one(scene, False, *([] if scene == "whole" else [f"engine.zero={scene[-1]}", "epochs=2"]))
        continue
    if scene == "evaluating":
        trainer.data.loader.build.Validation = Interrupted
    elif scene == "writing":
        trainer.checkpoint.save_load.Disk = Hearing
        trainer.run.assembly.Recorder = Telling
    elif scene == "full":
        trainer.checkpoint.save_load.Disk, trainer.run.assembly.Recorder = Full, Waiting
    elif scene == "training":
        Engine.reseed = at_step  # pyright: ignore
    elif scene == "compiling":
        callback_handler.register_start_callback(once(hear))
    one(scene, False, *(["checkpoint.every=3step"] if scene == "full" else []))
    trainer.data.loader.build.Validation, trainer.run.assembly.Recorder = Validation, Recorder
    trainer.checkpoint.save_load.Disk, Engine.reseed = Disk, reseed
    one(scene, True)
end_process(0)
