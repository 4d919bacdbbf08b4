"""Seconds of a run by cause: their sum is the wall time of all attempts, whatever was killed."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.analysis.report.goodput import NAMES, by_cause
from trainer.engine import place_clock
from trainer.engine.place_clock import CONTROL, DATA, EVALUATION, STEP, PlaceClock


def start(attempt: int, time: float, starting: float = 10.0) -> dict[str, Any]:
    return {"kind": "start", "attempt": attempt, "time": time, "starting": starting}


def resume(attempt: int, time: float, step: int) -> dict[str, Any]:
    return {"kind": "resume", "attempt": attempt, "time": time, "step": step}


def step(attempt: int, time: float, number: int, kind: str = "step", **spent: float) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "time": time, "step": number, "spent": spent}


def test_one_attempt_is_its_lifetime() -> None:
    """From 0 (the process starts) to 100."""
    lines = [
        start(0, 10),
        step(0, 50, 5, start=20, training=30),
        step(0, 100, 9, "end", start=20, training=50, save=10, stall=20),
    ]
    found = by_cause(lines)
    assert found == dict.fromkeys(NAMES, 0.0) | {"start": 20, "training": 50, "save": 10, "stall": 20}
    assert list(found) == list(NAMES)


def test_steps_after_the_checkpoint_of_a_killed_attempt_are_repeated() -> None:
    """Killed at 90; its checkpoint was that of step 5, logged at 50. The second attempt lives from 1000 to 1100."""
    lines = [
        start(0, 10), step(0, 50, 5, start=20, training=25, save=5), step(0, 90, 9, start=20, training=65, save=5),
        start(1, 1010), resume(1, 1011, 5), step(1, 1100, 12, "end", start=15, training=70, evaluation=15),
    ]  # fmt: skip
    found = by_cause(lines)
    assert found["repeated"] == 40 and found["start"] == 35 and found["training"] == 25 + 70 and found["save"] == 5
    assert sum(found.values()) == 90 + 100


def test_an_attempt_without_a_step_that_survives_is_lost() -> None:
    lines = [
        start(0, 10), step(0, 50, 5, start=20, training=30),
        start(1, 1010), resume(1, 1011, 5), step(1, 1060, 8, start=15, training=45),
        start(2, 2010), resume(2, 2011, 5), step(2, 2050, 9, "end", start=10, training=40),
    ]  # fmt: skip
    found = by_cause(lines)
    assert found["lost"] == 60 and found["repeated"] == 0 and found["training"] == 70
    assert sum(found.values()) == 50 + 60 + 50


def test_a_run_that_began_anew_has_lost_what_it_had() -> None:
    found = by_cause([start(0, 10), step(0, 50, 5, training=50), start(1, 110), step(1, 150, 5, training=50)])
    assert found["lost"] == 50 and found["training"] == 50


def test_what_was_not_recorded_is_the_rest() -> None:
    lines = [start(0, 10), step(0, 50, 5, training=50), {"kind": "eval", "attempt": 0, "time": 70.0, "step": 5}]
    assert by_cause(lines)["rest"] == 20
    old = [start(0, 10), {"kind": "step", "attempt": 0, "time": 50.0, "step": 5}]
    assert by_cause(old) == {}, "no attempt has recorded causes"
    mixed = by_cause([*old, start(1, 110), resume(1, 111, 5), step(1, 150, 8, training=50)])
    assert mixed["rest"] == 50 and mixed["training"] == 50


def test_a_clock_gives_every_second_to_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(place_clock.time, "monotonic", lambda: now)
    clock = PlaceClock()
    begun = sum(clock.spent().values())  # the lifetime of this process
    now += 3
    with clock.within(DATA, 0):
        now += 2
    clock.at(STEP, 1)
    now += 5
    clock.complete_step()
    with clock.within(DATA, 1):
        now += 7
    clock.at(STEP, 2)
    now += 11
    with clock.within(EVALUATION, 2):
        now += 13
        with clock.within(CONTROL, 2):
            now += 17
        now += 1
    now += 19
    found = clock.spent()
    assert found["start"] == pytest.approx(begun + 3) and found["first_step"] == 2 + 5 and found["stall"] == 7
    assert (found["training"], found["evaluation"], found["control"], found["save"]) == (11 + 19, 14, 17, 0)
    assert sum(found.values()) == pytest.approx(begun + 78)
    assert clock.place == STEP and clock.step == 2
