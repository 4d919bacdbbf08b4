"""`trilevel estimate --mtbf`: the simulation against Daly's closed form, its sums, its best interval, what it reads and refuses."""

from __future__ import annotations

import json
import math
from statistics import mean
from typing import Any

import pytest

from tests.preflight.test_estimate import CONFIG, PASSES, settings
from tests.support.journals import write
from trainer.__main__ import main
from trainer.config.errors import ConfigError
from trainer.config.values import Duration
from trainer.preflight import fault_simulation as faults
from trainer.preflight.fault_costs import RESTART, FaultCosts, measured_costs
from trainer.preflight.fault_simulation import CAUSES, simulate


def expected(work: float, interval: float, mtbf: float, start: float, blocking: float) -> float:
    """Mean wall time with exponential faults (Daly 2006, eq. 13 with a start before the first segment)."""
    segment, count = interval + blocking, round(work / interval)
    first = mtbf * (math.exp((start + segment) / mtbf) - 1)
    return first + (count - 1) * mtbf * math.exp(start / mtbf) * (math.exp(segment / mtbf) - 1)


@pytest.mark.parametrize("mtbf", [200.0, 1000.0, 10_000.0])
@pytest.mark.parametrize("interval", [50.0, 250.0])
def test_the_mean_wall_time_is_that_of_the_closed_form(mtbf, interval):
    costs = FaultCosts(start=40.0, blocking=5.0, write=5.0)
    walls = [sum(simulate(2000.0, interval, mtbf, costs, seed).values()) for seed in range(3000)]
    assert mean(walls) == pytest.approx(expected(2000.0, interval, mtbf, 40.0, 5.0), rel=0.03)


def test_without_faults_only_a_start_and_the_saves_are_added():
    spent = simulate(1000.0, 300.0, 1e12, FaultCosts(40.0, 5.0, 9.0), seed=1)
    assert spent == {"training": 1000.0, "save": 20.0, "start": 40.0, "repeated": 0.0, "detection": 0.0, "restart": 0.0}


@pytest.mark.parametrize("restart", [0.0, 300.0])
def test_the_time_from_a_fault_to_the_next_start_is_added_for_every_fault(restart):
    """Faults come at rate 1 / mtbf while processes live, so a run has wall time / mtbf of them on average."""
    alive = expected(2000.0, 250.0, 1000.0, 40.0, 5.0)
    costs = FaultCosts(40.0, 5.0, 5.0, restart=restart)
    walls = [sum(simulate(2000.0, 250.0, 1000.0, costs, seed).values()) for seed in range(3000)]
    assert mean(walls) == pytest.approx(alive * (1 + restart / 1000.0), rel=0.03)
    shares = faults.goodput(2000.0, 250.0, 1000.0, costs).shares
    assert sum(shares.values()) == pytest.approx(1.0) and (shares["restart"] > 0) == (restart > 0)


def test_all_work_is_done_once_whatever_the_faults():
    for seed in range(50):
        spent = simulate(1000.0, 70.0, 150.0, FaultCosts(10.0, 2.0, 30.0, 60.0), seed)
        assert spent["training"] == pytest.approx(1000.0) and min(spent.values()) >= 0
        assert spent["detection"] % 60 == 0


def test_a_checkpoint_that_is_still_being_written_does_not_count(monkeypatch):
    class OneFault:
        def __init__(self, seed: int) -> None:
            self.left = [10 + 2 * 102 + 29.0]  # the second checkpoint began 31 s ago, less its blocking of 2 s

        def expovariate(self, rate: float) -> float:
            return self.left.pop() if self.left else 1e12

    monkeypatch.setattr(faults, "Random", OneFault)
    late = simulate(1000.0, 100.0, 1.0, FaultCosts(10.0, 2.0, 32.0), 0)
    in_time = simulate(1000.0, 100.0, 1.0, FaultCosts(10.0, 2.0, 31.0), 0)
    assert late["repeated"] == pytest.approx(102 + 29) and in_time["repeated"] == pytest.approx(29)


def test_a_run_that_can_not_start_between_two_faults_does_not_end():
    found = faults.goodput(1000.0, 100.0, 1.0, FaultCosts(60.0, 1.0, 1.0), runs=2)
    assert found.goodput == 0 and found.hours == math.inf


def test_a_run_that_does_not_end_is_given_up_at_once(monkeypatch):
    """A start takes 24 times the time between faults. Once a simulated run does not end, the others are not simulated."""
    asked: list[float] = []
    whole = simulate

    def counted(work: float, interval: float, mtbf: float, costs: FaultCosts, seed: int) -> dict[str, float]:
        asked.append(interval)
        return whole(work, interval, mtbf, costs, seed)

    monkeypatch.setattr(faults, "simulate", counted)
    monkeypatch.setattr(faults, "MOST_IN_VAIN", 50)
    found = faults.forecast(100.0, 3_600_000, 10, Duration(count=1, unit="ep"), 600.0, [5.0], FaultCosts(120.0, 1.0, 1.0))
    assert found.rows[0][2].goodput == 0 and len(asked) == 2 + len(set(asked[2:]))
    assert 0 < faults.goodput(3600.0, 60.0, 200.0, FaultCosts(20.0, 1.0, 1.0)).goodput < 1


@pytest.mark.parametrize("mtbf", [600.0, 3 * 3600.0])
def test_the_best_interval_is_near_that_of_young_and_better_than_its_neighbours(mtbf):
    costs = FaultCosts(30.0, 2.0, 2.0)
    best = faults.best_interval(100 * 3600.0, mtbf, costs, 0.5)
    young = faults.youngs_interval(mtbf, 2.0)
    assert young / 2 <= best.interval <= young * 2
    for factor in (0.2, 5.0):
        assert faults.goodput(100 * 3600.0, young * factor, mtbf, costs).goodput < best.goodput


def test_intervals_in_epochs_and_steps_and_at_the_end_only():
    costs = FaultCosts(10.0, 1.0, 1.0)

    def interval(every: Duration) -> float:
        return faults.forecast(10.0, 36_000, 20, every, 0.0, [1e9], costs).rows[0][0].interval

    assert interval(Duration(count=500, unit="step")) == pytest.approx(500.0)
    assert interval(Duration(count=2, unit="ep")) == pytest.approx(3600.0)
    assert interval(Duration(count=0, unit="ep")) == pytest.approx(36_000.0)


def line(kind: str, attempt: int = 0, time: float = 1.0, **fields: object) -> dict[str, Any]:
    return {"kind": kind, "time": time, "attempt": attempt, **fields}


def first_step(attempt: int, start: float, first: float, time: float = 1.0) -> dict[str, Any]:
    return line("step", attempt, time, step=1, spent={"start": start, "first_step": first, "training": 9.0})


def saves(*times: tuple[float, float]) -> list[dict[str, Any]]:
    return [line("checkpoint", step=n, path="x", blocking=b, seconds=s) for n, (b, s) in enumerate(times)]


def test_costs_are_the_medians_of_journals(tmp_path):
    """A save in the background is complete after the seconds that it blocked and those of writing."""
    write(tmp_path, [line("start", config={}, world=1), first_step(0, 8.0, 4.0), *saves((1.0, 3.0), (2.0, 9.0), (3.0, 7.0))])
    found = measured_costs([tmp_path])
    assert (found.start, found.blocking, found.write) == (12.0, 2.0, 10.0)
    given = measured_costs([tmp_path], start=5.0, save=4.0, restart=6.0)
    assert (given.start, given.blocking, given.write, given.restart, given.source) == (5.0, 4.0, 4.0, 6.0, "as given")
    with pytest.raises(ConfigError, match=r"seconds of a start not measured; set --start-seconds"):
        measured_costs([], save=4.0)
    for name in ("start", "save", "restart"):
        with pytest.raises(ConfigError, match=rf"--{name}-seconds -1: must be >= 0"):
            measured_costs([tmp_path], **{name: -1.0})


def test_a_save_that_training_waits_for_is_complete_when_it_ends(tmp_path):
    write(
        tmp_path / "front",
        [line("start", config={"checkpoint": {"asynchronous": False}}, world=1), first_step(0, 8.0, 4.0), *saves((5.0, 4.0))],
    )
    assert measured_costs([tmp_path / "front"]).write == 5.0
    begin, end = [line("start", config={}, world=1), first_step(0, 8.0, 4.0)], line("end", status="stopped", step=9)
    write(tmp_path / "one", [*begin, *saves((5.0, 4.0)), end])
    write(tmp_path / "two", [*begin, *saves((1.0, 4.0), (5.0, 4.0)), end])
    one, two = (measured_costs([tmp_path / name]) for name in ("one", "two"))
    assert (one.blocking, one.write, two.blocking, two.write) == (5.0, 5.0, 1.0, 5.0)


def test_only_attempts_that_completed_a_step_tell_what_a_start_takes(tmp_path):
    """Attempts of 100, 20 and 20 s; the last two failed before their first step. 15 and 25 s passed before the next one."""
    failed = [
        line("end", n, time, status="failed", step=1, spent={"start": 20.0, "first_step": 0.0})
        for n, time in ((1, 185.0), (2, 230.0))
    ]
    write(
        tmp_path,
        [
            line("start", 0, 60.0, config={}, world=1, starting=60.0), first_step(0, 60.0, 40.0, 150.0), *saves((1.0, 2.0)),
            line("start", 1, 170.0, config={}, world=1, starting=5.0), failed[0],
            line("start", 2, 215.0, config={}, world=1, starting=5.0), failed[1],
        ],
    )  # fmt: skip
    found = measured_costs([tmp_path])
    assert found.start == 100.0 and found.restart == 20.0 and "median of 2" in found.source


def test_a_restart_that_was_not_measured_is_the_default_and_the_text_names_it(tmp_path):
    write(tmp_path, [line("start", config={}, world=1), first_step(0, 8.0, 4.0), *saves((1.0, 3.0))])
    found = measured_costs([tmp_path])
    assert found.restart == RESTART == 30.0
    shown = faults.forecast(10.0, 36_000, 20, Duration(count=500, unit="step"), 0.0, [3600.0], found)
    assert "per fault 30 s until the next processes start (not measured" in shown.text() and "--restart-seconds" in shown.text()
    (row,) = shown.facts()
    assert row["restart_seconds"] == 30.0 and row["shares"]["restart"] > 0


@pytest.mark.parametrize(("text", "seconds"), [("3h", 10_800.0), ("10min", 600.0), (".5d", 43_200.0), ("90s", 90.0)])
def test_mtbf_has_a_unit(text, seconds):
    assert faults.parse_mtbf(text) == seconds


@pytest.mark.parametrize("text", ["3", "0h", "-1h", "3 hours", "nan"])
def test_an_mtbf_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"--mtbf .*write it as 3h, 10min"):
        faults.parse_mtbf(text)


def test_the_command_prints_the_table_and_writes_the_facts(digits, tmp_path, capsys):
    step = {name: {"unit": "ms", "images_per_second": 1 / seconds} for name, seconds in PASSES.items()} | {"run": {}}
    (tmp_path / "step.json").write_text(json.dumps(step))
    words = [
        "plan",
        CONFIG,
        *settings(digits),
        "--nodes",
        "4",
        "--from",
        str(tmp_path / "step.json"),
        "--json",
        str(tmp_path / "o.json"),
    ]
    times = ["--mtbf", "3h", "--mtbf", "3min", "--start-seconds", "60", "--save-seconds", "2", "--restart-seconds", "20"]
    assert main([*words, *times]) == 0
    shown = capsys.readouterr().out
    assert "simulated and not measured" in shown and "3 h" in shown and "3 min" in shown
    rows = json.loads((tmp_path / "o.json").read_text())["faults"]
    assert [row["mtbf_seconds"] for row in rows] == [10_800, 180] and rows[0]["goodput"] > rows[1]["goodput"]
    assert set(rows[0]["shares"]) == set(CAUSES) and rows[1]["goodput_hangs"] < rows[1]["goodput"]
    assert rows[0]["restart_seconds"] == 20 and "per fault 20 s until the next processes start (as given)" in shown
    assert main([*words, "--restart-seconds", "2"]) == 2
    assert "only with --mtbf" in capsys.readouterr().err
