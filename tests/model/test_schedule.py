"""The schedule of a run, to the bit: plans, rates and whole-run means as recorded at commit 4ca07e3, before `Schedule` had one place.

`schedules.json`: at 17 points of progress the keep ratios and the learning rate; where the plan changes (the first twelve), the last
plan, what the last eight epochs leave out, and the mean of .7 x tokens + .3 x connections over the run.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sparsity.types import DENSE, Plan
from tests.support import images
from trainer.config.load import parse
from trainer.config.run_config import Config
from trainer.model.build import build_schedule
from trainer.model.schedule import row_of

RECORDED = json.loads((Path(__file__).parent / "schedules.json").read_text())


def config(**sections: Any) -> Config:
    data = {"train": "x", "validation": "x"} | sections.pop("data", {})
    return parse({"name": "g", "model": {"name": "deit_tiny_patch16_224"}, "data": data} | sections)


def keeps(plan: Plan) -> list[float]:
    return [plan.keep_tokens, plan.keep_connections]


@pytest.mark.parametrize("recorded", RECORDED, ids=range(len(RECORDED)))
def test_every_number_is_as_recorded(recorded: dict[str, Any]) -> None:
    schedule = build_schedule(config(**recorded["config"]))
    points = [schedule.epochs * i / 16 for i in range(17)]
    assert [keeps(schedule.plan(point)) for point in points] == recorded["plans"]
    assert [schedule.lr(point) for point in points] == recorded["rates"]
    assert [stretch.start for stretch in schedule.stretches()][:12] == recorded["changes"]
    assert keeps(schedule.last()) == recorded["last"]
    assert schedule.mean(lambda plan: plan.keep_tokens * 0.7 + plan.keep_connections * 0.3) == recorded["mean"]
    last = range(schedule.epochs)[-8:]
    assert [schedule.left_out(epoch) for epoch in last] == recorded["left_out"]
    assert [schedule.shown(epoch) for epoch in last] == [1 - share for share in recorded["left_out"]]


@pytest.mark.parametrize("recorded", RECORDED, ids=range(len(RECORDED)))
def test_stretches_cover_the_run_and_each_has_one_plan(recorded: dict[str, Any]) -> None:
    schedule = build_schedule(config(**recorded["config"]))
    found = schedule.stretches()
    assert found[0].start == 0.0 and found[-1].end == schedule.epochs
    assert all(a.end == b.start and a.plan != b.plan for a, b in pairwise(found))
    assert all(schedule.plan(stretch.start) == stretch.plan for stretch in found)
    rows = [row_of(stretch, found[-1].plan) for stretch in found]
    assert rows[-1] == "ours" and len(set(rows)) == len({stretch.plan for stretch in found}) == len(found)


def test_the_mean_of_a_constant_counts_what_is_shown() -> None:
    schedule = build_schedule(config(epochs=10, examples={"method": "random_epoch", "removed": 0.5, "anneal": 0.2}))
    assert schedule.mean(lambda plan: 1.0) == sum(schedule.shown(epoch) for epoch in range(10)) / 10 == 0.6
    unknown = build_schedule(config(epochs=10, examples={"method": "infobatch", "removed": 0.5}))
    assert not unknown.shares_known and unknown.mean(lambda plan: 1.0) == 1.0, "only the run can count them"


def test_a_level_that_is_off_keeps_all_on_every_stair():
    """Before, a report showed 67 % of the connections where none was left out."""
    plan = {"method": "staircase", "stairs": [["0ep", 0.8, 0.7], ["2ep", 0.6, 0.4]]}

    def plans(**levels: Any) -> list[tuple[float, Plan]]:
        return [
            (start, kept) for start, _, kept, _ in build_schedule(images.config("nowhere", plan=plan, **levels)).stretches()
        ]

    assert plans(tokens={"method": "random"}) == [(0.0, Plan(0.8, 1.0)), (2.0, Plan(0.6, 1.0))]
    assert plans(connections={"method": "exact"}) == [(0.0, Plan(1.0, 0.7)), (2.0, Plan(1.0, 0.4))]
    assert plans() == [(0.0, DENSE)]


@pytest.mark.parametrize(("epochs", "from_epoch"), [(60, 47.5), (110, 97.5), (111, 110.0)])
def test_a_change_at_the_very_end_is_not_the_last_plan(epochs, from_epoch):
    """A run scores under the plan that it trained under; `eval RUN` and `show` have to take the same."""
    levels = {"tokens": {"method": "topk", "keep": 0.7}, "connections": {"method": "exact", "keep": 0.1}}
    plan = {"method": "cosine", "warmup": "10ep", "length": "100ep"}
    schedule = build_schedule(config(epochs=epochs, plan=plan, **levels))
    start, end, plan, _ = schedule.stretches()[-1]
    assert (start, end, plan) == (from_epoch, epochs, schedule.last())
    assert build_schedule(config(epochs=epochs, **levels)).last() == Plan(0.7, 0.1)
