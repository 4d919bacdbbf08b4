"""What is due after a step: log, evaluate, save, end. Pure functions of the intervals and the position in the run."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from trainer.checkpoint.state import TrainState
from trainer.config.values import Duration


class Due(NamedTuple):
    """What follows a step, in this order: a log line, an evaluation, a checkpoint, the end of the attempt."""

    log: bool
    evaluate: bool
    save: bool
    end: bool
    status: str  # at the end: "finished", "preempted" (by a signal) or "stopped" (at `stop_at`); "" while the run continues


class Cadence(NamedTuple):
    """How often a run logs, evaluates and saves, and when it ends; an interval of 0 is never."""

    epochs: int
    stop_at: Duration | None
    log: Duration
    evaluate: Duration
    save: Duration

    def due(self, before: TrainState, after: TrainState, batches: int, *, stop: bool, skipped: bool) -> Due:
        """What is due after the step from `before` to `after`, in an epoch of `batches` steps.

        stop: a signal requested the end on some rank. skipped: the gradient was not finite, so the optimizer step was skipped.
        A log line precedes every checkpoint and evaluation, because the audit compares hashes at log lines.
        """
        finished = after.epoch == self.epochs
        end = finished or stop or reached(self.stop_at, after, batches)
        save = end or crosses(self.save, before, after, batches)
        evaluate = finished or crosses(self.evaluate, before, after, batches)
        log = save or evaluate or skipped or crosses(self.log, before, after, batches)
        status = "" if not end else "finished" if finished else "preempted" if stop else "stopped"
        return Due(log, evaluate, save, end, status)


def crosses(every: Duration, before: TrainState, after: TrainState, batches: int) -> bool:
    """Whether the step from `before` to `after` reached a multiple of `every`; always False for `every` 0."""
    if every.count == 0:
        return False
    if every.unit == "step":
        return after.step % int(every.count) == 0
    return every.multiples(_progress(after, batches)) > every.multiples(_progress(before, batches))


def reached(end: Duration | None, state: TrainState, batches: int) -> bool:
    """Whether the run is at `end` or past it; False without an `end`."""
    if end is None:
        return False
    return (state.step if end.unit == "step" else _progress(state, batches)) >= end.exact


def _progress(state: TrainState, batches: int) -> Fraction:
    """Epochs done, the current one as a fraction; `batches`: steps of the epoch of the last step."""
    return state.epoch + Fraction(state.batch, batches)
