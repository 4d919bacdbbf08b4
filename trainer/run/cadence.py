"""When to log, save, evaluate and stop, as functions of the position in the run."""

from __future__ import annotations

from trainer.checkpoint.state import TrainState
from trainer.config.values import Duration


def _progress(state: TrainState, batches: int) -> float:
    """Epochs behind, with the started one in part; `batches`: of the epoch the last step belonged to."""
    return state.epoch + state.batch / batches


def due(every: Duration, before: TrainState, after: TrainState, batches: int) -> bool:
    """Whether a multiple of `every` lies in the step from `before` to `after`; never where it is 0."""
    if every.count == 0:
        return False
    if every.unit == "step":
        return after.step % int(every.count) == 0
    return _progress(after, batches) // every.count > _progress(before, batches) // every.count


def reached(end: Duration | None, state: TrainState, batches: int) -> bool:
    if end is None:
        return False
    return (state.step if end.unit == "step" else _progress(state, batches)) >= end.count
