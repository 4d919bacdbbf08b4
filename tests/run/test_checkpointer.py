"""When a save blocks, what it writes and in which order, and which ranks raise after a failed one; its files: tests/checkpoint."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import wait_for
from trainer.checkpoint import save_load
from trainer.checkpoint.state import TrainState
from trainer.engine.errors import EngineError
from trainer.engine.heartbeat import Heartbeat
from trainer.engine.late_ranks import NOTHING
from trainer.run.checkpointer import Checkpointer
from trainer.run.shutdown import Stop


class Scene:
    """A Checkpointer over parts that record its calls; `gate` blocks the writing until it is set."""

    def __init__(self, *, main: bool = True, asynchronous: bool = True, reported: str | None = None):
        self.calls: list[Any] = []
        self.value, self.wrote = 1.0, list[float]()
        self.gate, self.error, self.stop = threading.Event(), None, Stop()
        self.exported: dict[str, float] = {}
        state = SimpleNamespace(
            weights=lambda copies: {"a": copies("a", torch.tensor(self.value)), "b": torch.tensor(2.0)},
            optimizer_state=lambda copies: {"a|exp_avg": torch.zeros(1)},
        )
        engine: Any = SimpleNamespace(state=state, is_main=main, all_gather=None, world=1, heartbeat=Heartbeat(0, 1, 0.0))
        engine.broadcast_object = lambda value: value if reported is None else reported  # what rank 0 holds
        recorder: Any = SimpleNamespace(checkpoints=Path("checkpoints"))
        recorder.sync = lambda: self.calls.append("journal synced")
        recorder.weights = lambda tensors: self.exported.update({k: float(v) for k, v in tensors.items()})
        recorder.saved = lambda state, path, blocking, seconds, weights: self.calls.append(
            (state.step, path, blocking, seconds)
        )
        ema: Any = SimpleNamespace(state_dict=lambda copies: {"a": torch.tensor(5.0)}, replicated=dict)
        examples: Any = SimpleNamespace(state_dict=lambda gather: {})
        self.it = Checkpointer(self.write, asynchronous, engine, recorder, self.stop, ema, examples)

    def write(self, state: TrainState, **tensors: Any) -> Path:
        assert self.gate.wait(30)
        self.wrote.append(float(tensors["weights"]["a"]))
        self.calls.append("written")
        if self.error:
            raise self.error
        return Path("checkpoints") / f"step-{state.step}"

    def save(self, step: int, last: bool = False) -> None:
        self.it.save(TrainState(step=step), None, last)


def test_training_continues_while_a_checkpoint_is_written() -> None:
    scene = Scene()
    scene.save(3)
    assert scene.calls == ["journal synced"] and scene.it.writing
    scene.it.poll()
    assert scene.calls == ["journal synced"], "nothing is recorded before it is written"
    scene.gate.set()
    wait_for(lambda: not scene.it.writing, 30)
    scene.it.poll()
    scene.it.poll()
    assert scene.calls[1] == "written" and scene.calls[2][:2] == (3, Path("checkpoints/step-3")) and len(scene.calls) == 3
    assert scene.exported == {"a": 5.0, "b": 2.0}, "weights.safetensors holds the averages where there are some"
    assert not scene.stop.requested()


def test_a_save_does_not_change_what_the_one_before_is_still_writing() -> None:
    scene = Scene()
    scene.save(3)
    scene.value = 7.0
    threading.Timer(0.3, scene.gate.set).start()
    scene.save(4)
    scene.it.wait()
    assert scene.wrote == [1.0, 7.0], "they share host memory"


@pytest.mark.parametrize(("last", "asynchronous"), [(True, True), (False, False)])
def test_the_last_one_and_one_in_the_foreground_are_waited_for(last: bool, asynchronous: bool) -> None:
    scene = Scene(asynchronous=asynchronous)
    threading.Timer(0.3, scene.gate.set).start()
    began = time.perf_counter()
    scene.save(3, last)
    took = time.perf_counter() - began
    step, _, blocking, seconds = scene.calls[-1]
    assert step == 3 and scene.calls[:2] == ["journal synced", "written"] and not scene.it.writing
    assert 0.2 < seconds <= took and 0.2 < blocking <= took, "all of it blocked training"


def test_the_next_save_waits_for_the_one_before() -> None:
    scene = Scene()
    scene.save(3)
    threading.Timer(0.2, scene.gate.set).start()
    scene.save(4)
    wait_for(lambda: not scene.it.writing, 30)
    scene.it.wait()
    words = [call if isinstance(call, str) else call[0] for call in scene.calls]
    assert words == ["journal synced", "written", 3, "journal synced", "written", 4]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device"),
            r"step 3 could not be written: .*No space left.*previous checkpoint is intact",
        ),
        (FileNotFoundError(2, "No such file"), r"step 3 could not be written: .*run directory removed or renamed"),
        (RuntimeError("a bug"), r"step 3 could not be written: RuntimeError: a bug"),
    ],
)
def test_a_failed_write_requests_a_stop_and_is_raised_at_the_next_wait(error: Exception, message: str) -> None:
    scene = Scene()
    scene.error = error
    scene.gate.set()
    scene.save(3)
    wait_for(lambda: not scene.it.writing, 30)
    assert not scene.stop.requested()
    scene.it.poll()
    assert scene.stop.requested()
    with pytest.raises(save_load.CheckpointError, match=message):
        scene.save(4, last=True)
    assert scene.exported == {} and scene.calls == ["journal synced", "written"]


def test_other_ranks_write_nothing_and_raise_the_error_of_rank_0() -> None:
    scene = Scene(main=False)
    scene.save(3, last=True)
    assert scene.calls == [] and not scene.it.writing
    failed = Scene(main=False, reported="the disk of rank 0 is full")
    with pytest.raises(save_load.CheckpointError, match="the disk of rank 0 is full"):
        failed.it.wait()


def test_every_save_compares_the_replicas_before_it_writes() -> None:
    """Also the one after an interrupted probe or evaluation: with different weights nothing is written."""
    scene = Scene()
    engine: Any = scene.it.engine
    engine.world, engine.all_gather = 2, lambda one: torch.cat([one, one + 1])
    engine.all_gather_objects = lambda items: [*items, "other"]
    scene.it.ema.replicated = lambda: {"a": torch.ones(2)}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(EngineError, match="replicas differ at step 3"):
        scene.save(3)
    assert scene.calls == [] and not scene.it.writing


def test_a_wait_for_the_own_write_is_work_that_heartbeats_state() -> None:
    scene, found = Scene(), []
    scene.save(3)
    beat: Any = scene.it.engine.heartbeat

    def look() -> None:
        found.append(beat._position()[3])
        scene.gate.set()

    threading.Timer(0.3, look).start()
    scene.it.wait()
    assert found[0] >= 0 and beat._position()[3] == NOTHING
