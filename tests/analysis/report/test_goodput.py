"""Seconds of a run by cause: their sum is the time from the first start to the last line less the pauses, whatever was killed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.journals import write
from trainer.analysis.report.goodput import NAMES, before_attempt, gaps, time_account
from trainer.analysis.report.summary import summary
from trainer.engine import place_clock
from trainer.engine.place_clock import CONTROL, DATA, EVALUATION, STEP, PlaceClock


def start(attempt: int, time: float, starting: float = 10.0) -> dict[str, Any]:
    return {"kind": "start", "attempt": attempt, "time": time, "starting": starting}


def resume(attempt: int, time: float, step: int) -> dict[str, Any]:
    return {"kind": "resume", "attempt": attempt, "time": time, "step": step}


def step(attempt: int, time: float, number: int, kind: str = "step", **spent: float) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "time": time, "step": number, "spent": spent}


def by_cause(lines: list[dict[str, Any]]) -> dict[str, float]:
    return time_account(lines).seconds


def end(attempt: int, time: float, number: int, status: str, **more: Any) -> dict[str, Any]:
    return {"kind": "end", "attempt": attempt, "time": time, "step": number, "status": status, **more}


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
    assert found["restart"] == 910 and sum(found.values()) == 1100


def test_an_attempt_without_a_step_that_survives_is_lost() -> None:
    lines = [
        start(0, 10), step(0, 50, 5, start=20, training=30),
        start(1, 1010), resume(1, 1011, 5), step(1, 1060, 8, start=15, training=45),
        start(2, 2010), resume(2, 2011, 5), step(2, 2050, 9, "end", start=10, training=40),
    ]  # fmt: skip
    found = by_cause(lines)
    assert found["lost"] == 60 and found["repeated"] == 0 and found["training"] == 70
    assert found["restart"] == 950 + 940 and sum(found.values()) == 2050


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


def test_time_after_a_failure_is_restart_and_time_after_a_stop_is_a_pause() -> None:
    """Failed at 100, started 20 s later; stopped at 200, continued at 5000; finished at 5100, extended at 9000."""
    lines = [
        start(0, 10), step(0, 90, 5, start=20, training=70), end(0, 100, 5, "failed"),
        start(1, 130), resume(1, 131, 5), step(1, 200, 9, "end", start=20, training=60) | {"status": "stopped"},
        start(2, 5010), resume(2, 5011, 9), step(2, 5100, 20, "end", start=20, training=80) | {"status": "finished"},
        start(3, 9010), resume(3, 9011, 20), step(3, 9100, 30, "end", start=20, training=80) | {"status": "finished"},
    ]  # fmt: skip
    found = time_account(lines)
    assert found.seconds["restart"] == 20 and found.paused == 4800 + 3900 and found.notes == ()
    assert found.total == 9100 - found.paused
    assert found.goodput == pytest.approx((70 + 60 + 80 + 80) / (100 + 20 + 80 + 100 + 100))


@pytest.mark.parametrize("starting", [30.0, None])
def test_attempts_that_end_before_their_start_line_are_part_of_the_restart(starting: float | None) -> None:
    """Killed at 100; the attempts 1 and 2 fail at 150 and 200 while they start; attempt 3 starts at 230."""
    early = {} if starting is None else {"starting": starting}
    lines = [
        start(0, 10), step(0, 100, 5, start=20, training=80),
        end(1, 150, 0, "failed", **early), end(2, 200, 0, "failed", **early),
        start(3, 240), resume(3, 241, 5), step(3, 300, 9, "end", start=20, training=50),
    ]  # fmt: skip
    found = by_cause(lines)
    assert found["restart"] == 130 and found["lost"] == 0 and sum(found.values()) == 300
    begun = by_cause([end(0, 50, 0, "failed", **early), start(1, 90), step(1, 180, 5, start=20, training=80)])
    assert begun["restart"] == 30 + (starting or 0.0)


def test_an_evaluation_and_a_save_before_the_kill_are_not_repeated() -> None:
    """The step line of step 5 at 100, then 300 s of evaluation, a save of 60 s, 7 s of steps, and a kill."""
    lines = [
        start(0, 10), step(0, 100, 5, start=20, training=80),
        {"kind": "eval", "attempt": 0, "time": 400.0, "step": 5, "seconds": 300.0, "ema": False},
        {"kind": "checkpoint", "attempt": 0, "time": 460.0, "step": 5, "blocking": 60.0, "seconds": 60.0},
        {"kind": "message", "attempt": 0, "time": 467.0},
    ]  # fmt: skip
    later = [start(1, 507), resume(1, 507, 5), step(1, 597, 9, "end", start=20, training=80)]
    found = by_cause([*lines, *later])
    assert (found["evaluation"], found["save"], found["repeated"], found["restart"]) == (300, 60, 7, 30)
    alone = by_cause(lines)
    assert (alone["evaluation"], alone["save"], alone["rest"]) == (300, 60, 7)
    dropped = by_cause([*lines, start(1, 507), resume(1, 507, 3), step(1, 597, 9, "end", start=20, training=80)])
    assert dropped["evaluation"] == dropped["save"] == 0 and sum(dropped.values()) == 597


def test_a_save_in_the_background_counts_once() -> None:
    """Saved at step 5 (100 s), on disk after the line of step 8; the blocking of 4 s is in the record of step 8 already."""
    lines = [
        start(0, 10), step(0, 100, 5, start=20, training=80), step(0, 140, 8, start=20, training=116, save=4),
        {"kind": "checkpoint", "attempt": 0, "time": 150.0, "step": 5, "blocking": 4.0, "seconds": 40.0},
    ]  # fmt: skip
    assert by_cause(lines)["save"] == 4 and by_cause(lines)["rest"] == 10
    killed = by_cause([*lines, start(1, 160), resume(1, 160, 5), step(1, 250, 9, "end", start=20, training=80)])
    assert killed["save"] == 4 and killed["repeated"] == 46


def test_steps_between_the_last_line_and_a_failure_did_not_survive() -> None:
    """The end line of a failed attempt has the step of its last step line; the steps and the wait since then are done again."""
    lines = [
        start(0, 10), step(0, 100, 5, start=20, training=80), step(0, 700, 5, "end", start=20, training=680) | {"status": "failed"},
        start(1, 710), resume(1, 711, 5), step(1, 800, 9, "end", start=20, training=80),
    ]  # fmt: skip
    assert by_cause(lines)["repeated"] == 600 and by_cause(lines)["training"] == 160


@pytest.mark.parametrize("jump", [-4000.0, 365 * 86_400.0])
def test_a_clock_that_is_set_between_two_attempts_counts_as_nothing_and_is_reported(tmp_path: Path, jump: float) -> None:
    first = [start(0, 10), step(0, 90, 5, start=20, training=70)]
    second = [start(1, 130), resume(1, 131, 5), step(1, 200, 9, "end", start=20, training=60) | {"status": "finished"}]
    found = time_account([*first, *({**line, "time": line["time"] + jump} for line in second)])
    assert found.seconds["restart"] == 0 and found.total == 90 + 80 and found.goodput <= 1
    (note,) = found.notes
    assert "between attempts 0 and 1" in note and "counted as 0" in note
    run = write(tmp_path, [*first, *({**line, "time": line["time"] + jump} for line in second)])
    row = next(row for row in summary(run).rows if row.what == "time by cause")
    assert note in row.note


def test_the_report_has_one_goodput(tmp_path: Path) -> None:
    """Its row, the share of training in `time by cause` and the value while the run goes on are the same number."""
    lines = [
        start(0, 10), step(0, 90, 5, start=20, training=70) | {"goodput": 0.99},
        start(1, 130), resume(1, 131, 5), step(1, 200, 9, start=20, training=60) | {"goodput": 0.99},
    ]  # fmt: skip
    account = time_account(lines)
    rows = {row.what: (row.value, row.note) for row in summary(write(tmp_path, lines)).rows}
    assert rows["goodput"][0] == "65.0 %" and "training 65.0," in rows["time by cause"][1] and account.goodput == 130 / 200
    useful, counted = before_attempt(tmp_path, 1, now=130.0, living=10.0, step=5)
    assert (useful, counted) == (70, 90 + 30)
    assert (useful + 60) / (counted + 80) == account.goodput
    assert before_attempt(tmp_path, 0, now=10.0, living=10.0, step=0) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(200))
def test_the_sum_is_the_time_from_the_first_start_to_the_last_line_less_the_pauses(seed: int) -> None:
    """Random runs: kills, failures before and after the start line, stops, evaluations, saves in the background."""
    lines, begin, paused = _random_run(random.Random(seed))
    found = time_account(lines)
    assert min(found.seconds.values()) >= 0 and found.paused == pytest.approx(paused)
    assert found.total == pytest.approx(lines[-1]["time"] - begin - paused)
    assert sum(gap.seconds for gap in gaps(lines) if gap.failed) <= found.seconds["restart"] + 1e-6


def _random_run(draw: random.Random) -> tuple[list[dict[str, Any]], float, float]:
    """Lines; the start of the first attempt; seconds between attempts after a stop."""
    lines: list[dict[str, Any]] = []
    begin = now = draw.uniform(0, 1e9)
    saved, paused, status = 0, 0.0, ""
    for attempt in range(draw.randint(1, 6)):
        if attempt:
            gap = draw.uniform(0, 5000)
            now += gap
            paused += gap if status in ("stopped", "finished") else 0.0
        starting, number, here = draw.uniform(1, 50), saved, {"attempt": attempt}
        born, now = now, now + starting
        status = draw.choice(["", "failed", "failed", "stopped", "finished"])
        if draw.random() < 0.2 and (attempt or status):
            status = "failed"
            lines.append(end(attempt, now, number, status, starting=starting))
            continue
        lines.append(start(attempt, now, starting))
        lines += [resume(attempt, now, saved)] if attempt else []
        spent = {"start": starting, "training": 0.0, "evaluation": 0.0, "save": 0.0}
        for _ in range(draw.randint(0, 5)):
            took, number = draw.uniform(1, 300), number + draw.randint(1, 9)
            now, spent["training"] = now + took, spent["training"] + took
            lines.append(step(attempt, now, number) | {"spent": dict(spent)})
            if draw.random() < 0.4:
                took = draw.uniform(1, 300)
                now, spent["evaluation"] = now + took, spent["evaluation"] + took
                lines.append({"kind": "eval", "time": now, "step": number, "seconds": took, "ema": False, **here})
            if draw.random() < 0.4:
                took, late = draw.uniform(0, 60), draw.uniform(0, 40)
                now, spent["save"], saved = now + took, spent["save"] + took, number
                now, spent["training"] = now + late, spent["training"] + late
                lines.append({"kind": "checkpoint", "time": now, "step": number, "blocking": took, "seconds": late, **here})
        if status:
            now, spent["training"] = now + 3, spent["training"] + 3
            lines.append(end(attempt, now, number, status, spent=dict(spent)))
            saved = number if status != "failed" else saved
        assert now - born == pytest.approx(sum(spent.values()))
    if not any("spent" in line for line in lines):
        lines.append(step(attempt + 1, now, saved, "message", start=0.0))
    return lines, begin, paused


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
