"""Numbers that the host reads later: when they come, in which order, and what of them is known at once."""

from __future__ import annotations

import torch

from trainer.checkpoint.state import TrainState
from trainer.engine.delayed import Delayed
from trainer.run.nonfinite_steps import Outcomes

CPU = torch.device("cpu")


def test_on_a_cpu_every_number_comes_at_once() -> None:
    assert [Delayed(CPU).add(torch.tensor(float(n)), n) for n in range(2)] == [[(0.0, 0)], [(1.0, 1)]]


def test_a_number_comes_two_calls_later_with_its_tag_and_is_the_one_that_was_given() -> None:
    delayed, value = Delayed(CPU, behind=2), torch.zeros(())
    found = []
    for step in range(5):
        value.fill_(10.0 * step)  # the same memory again: the number must have been copied
        found.append(delayed.add(value, step))
    assert found == [[], [], [(0.0, 0)], [(10.0, 1)], [(20.0, 2)]]
    assert delayed.flush() == [(30.0, 3), (40.0, 4)] and delayed.flush() == []


def test_what_the_host_knows_comes_at_once_but_not_before_earlier_numbers() -> None:
    delayed = Delayed(CPU, behind=2)
    assert delayed.add(True, "a") == [(1.0, "a")]
    assert delayed.add(torch.tensor(True), "b") == []
    assert delayed.add(False, "c") == []
    assert delayed.add(False, "d") == [(1.0, "b"), (0.0, "c"), (0.0, "d")]


def test_steps_that_were_not_taken_are_named_whenever_that_is_known() -> None:
    taken = [True, False, True, True, False]
    outcomes = Outcomes(CPU)
    outcomes._delayed = Delayed(CPU, behind=2)
    known = [outcomes.add(torch.tensor(one), TrainState(step=step)) for step, one in enumerate(taken)]
    assert [[before.step for before in befores] for befores in known] == [[], [], [], [1], []]
    assert [before.step for before in outcomes.flush()] == [4]
    assert [before.step for before in Outcomes(CPU).add(False, TrainState(step=3))] == [3]
