"""What is due after a step, on a grid of positions, intervals and interruptions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from trainer.checkpoint.state import TrainState
from trainer.config.values import Duration, Length
from trainer.run.cadence import Cadence, crosses, reached

EPOCHS = 3


def length(text: str) -> Duration:
    return TypeAdapter(Length).validate_python(text)


def cadence(log: str = "1000step", evaluate: str = "0ep", save: str = "0ep", stop_at: str | None = None) -> Cadence:
    return Cadence(EPOCHS, length(stop_at) if stop_at else None, length(log), length(evaluate), length(save))


def walk(batches: int):
    """Each step of a run of EPOCHS epochs: the state before it and after it."""
    state = TrainState()
    while state.epoch < EPOCHS:
        before, state = state, state.advanced(batches)
        yield before, state


@pytest.mark.parametrize("batches", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("every", ["1step", "2step", "3step", "0.1ep", "0.3ep", "0.5ep", "1ep", "1.5ep", "2ep"])
def test_an_interval_is_met_once_per_multiple(batches: int, every: str):
    """Over a whole run, as often as multiples of the interval lie in it; with an interval below a step, once per step."""
    duration = length(every)
    met = [after.step for before, after in walk(batches) if crosses(duration, before, after, batches)]
    total = EPOCHS * batches
    if duration.unit == "step":
        assert met == list(range(int(duration.count), total + 1, int(duration.count)))
    else:
        steps = {math.ceil(k * duration.exact * batches) for k in range(1, int(EPOCHS / duration.exact) + 1)}
        assert met == sorted(steps)


@pytest.mark.parametrize("every", ["0.1ep", "0.7ep", "1.1ep"])
def test_a_stop_at_or_a_checkpoint_to_keep_is_met_at_the_step_that_reaches_it(every: str):
    """Also where a product of floats is above its decimal: 3 x .1, 7 x .1 and 11 x .1 of ten steps."""
    first = next(after for _, after in walk(10) if reached(length(every), after, 10))
    assert first.step == round(10 * length(every).count)
    assert length(every).multiples(first.epoch + first.batch / 10) == 1
    assert [length("0.1ep").multiples(step / 10) for step in range(31)] == list(range(31))


def test_zero_is_never():
    assert not any(crosses(length("0ep"), before, after, 5) for before, after in walk(5))


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("batches", [1, 4])
def test_what_follows_from_what(batches: int, stop: bool, skipped: bool):
    for log, evaluate, save, stop_at in itertools.product(
        ["1000step", "3step"], ["0ep", "1ep"], ["0ep", "2step"], [None, "5step", "1.5ep"]
    ):
        intervals = cadence(log, evaluate, save, stop_at)
        for before, after in walk(batches):
            due = intervals.due(before, after, batches, stop=stop, skipped=skipped)
            finished = after.epoch == EPOCHS
            assert due.end == (finished or stop or reached(intervals.stop_at, after, batches))
            assert due.save == (due.end or crosses(intervals.save, before, after, batches))
            assert due.evaluate == (finished or crosses(intervals.evaluate, before, after, batches))
            # the audit compares hashes at log lines: what is saved, evaluated or skipped has one before it
            assert due.log >= (due.save or due.evaluate or skipped)
            assert bool(due.status) == due.end
            if due.end:
                assert due.status == ("finished" if finished else "preempted" if stop else "stopped")


def test_after_a_plain_step_nothing_is_due():
    before, after = next(walk(10))
    assert cadence().due(before, after, 10, stop=False, skipped=False) == (False, False, False, False, "")


def test_stop_at_in_steps_and_in_epochs():
    state = replace(TrainState(), epoch=1, batch=2, step=6)
    assert reached(length("6step"), state, 4) and not reached(length("7step"), state, 4)
    assert reached(length("1.5ep"), state, 4) and not reached(length("1.51ep"), state, 4)
    assert not reached(None, state, 4)
