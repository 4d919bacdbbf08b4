"""Plans as pure functions of progress: golden values of the cosine, plateaus, stairs, and the list of changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.schedule import PLANS, KeepSchedule
from sparsity.types import DENSE, Plan
from tests.support import images
from trainer.model.schedule import keep_schedule, last_plan

TRI_LEVEL = {"method": "cosine", "keep_tokens": 0.7, "keep_connections": 0.1, "warmup": 10.0, "length": 100.0}


@pytest.mark.parametrize(
    ("epoch", "tokens", "connections"),
    [(0, 1, 1), (9.99, 1, 1), (35, 0.956, 0.868), (60, 0.85, 0.55), (85, 0.744, 0.232), (110, 0.7, 0.1), (299, 0.7, 0.1)],
)
def test_the_cosine_of_the_papers_code(epoch, tokens, connections):
    found = KeepSchedule(**TRI_LEVEL, plateaus=0).at(epoch)
    assert (found.keep_tokens, found.keep_connections) == pytest.approx((tokens, connections), abs=5e-4)


def test_plateaus_are_few_and_cost_what_the_curve_costs():
    values = [KeepSchedule(**TRI_LEVEL, plateaus=8).at(epoch / 8) for epoch in range(8 * 300)]
    assert len(set(values)) == 10  # dense, eight on the way, the end
    assert values == sorted(values, key=lambda p: -p.keep_tokens)
    smooth = [KeepSchedule(**TRI_LEVEL, plateaus=0).at(epoch / 8) for epoch in range(8 * 300)]
    for name in ("keep_tokens", "keep_connections"):
        assert sum(getattr(p, name) for p in values) == pytest.approx(sum(getattr(p, name) for p in smooth), rel=1e-3)


def test_changes_of_a_cosine():
    found = KeepSchedule(**TRI_LEVEL, plateaus=4).changes(300)
    assert [progress for progress, _ in found] == [0, 10, 35, 60, 85, 110]
    assert found[0][1] == DENSE and found[-1][1] == Plan(0.7, 0.1)
    assert [progress for progress, _ in KeepSchedule(**TRI_LEVEL, plateaus=4).changes(50)] == [
        0,
        10,
        35,
    ]  # a run that ends before the schedule


def test_constant_and_stairs():
    assert KeepSchedule(keep_tokens=0.5).at(0) == Plan(0.5, 1.0)
    assert KeepSchedule(keep_tokens=0.5).changes(10) == [(0.0, Plan(0.5, 1.0))]
    stairs = [(2.0, 0.9, 1.0), (5.0, 0.5, 0.25)]
    assert [KeepSchedule("staircase", stairs=stairs).at(e) for e in (1.99, 2, 4.9, 7)] == [
        DENSE,
        Plan(0.9),
        Plan(0.9),
        Plan(0.5, 0.25),
    ]
    assert KeepSchedule("staircase", stairs=stairs).changes(10) == [(0.0, DENSE), (2.0, Plan(0.9)), (5.0, Plan(0.5, 0.25))]


def test_a_level_that_is_off_keeps_all_on_every_stair():
    """Before, a report said 67 % of the connections where none was left out."""
    plan = {"method": "staircase", "stairs": [["0ep", 0.8, 0.7], ["2ep", 0.6, 0.4]]}
    found = {
        level: keep_schedule(
            images.config("nowhere", plan=plan, **{level: {"method": "random" if level == "tokens" else "exact"}})
        )
        for level in ("tokens", "connections")
    }
    assert found["tokens"].changes(9) == [(0.0, Plan(0.8, 1.0)), (2.0, Plan(0.6, 1.0))]
    assert found["connections"].changes(9) == [(0.0, Plan(1.0, 0.7)), (2.0, Plan(1.0, 0.4))]
    assert keep_schedule(images.config("nowhere", plan=plan)).changes(9) == [(0.0, DENSE)]


@pytest.mark.parametrize(("epochs", "from_epoch"), [(60, 47.5), (110, 97.5), (111, 110.0)])
def test_a_change_at_the_very_end_is_not_the_last_plan(epochs, from_epoch):
    """A run scores under the plan that it trained under; `eval RUN` and `show` have to take the same."""
    levels = {"tokens": {"method": "topk", "keep": 0.7}, "connections": {"method": "exact", "keep": 0.1}}
    config = images.config("nowhere", plan={"method": "cosine"}, **levels).model_copy(update={"epochs": epochs})
    assert keep_schedule(config).changes(epochs)[-1] == (from_epoch, last_plan(config))
    constant = config.model_copy(update={"plan": config.plan.model_copy(update={"method": "constant"})})
    assert last_plan(constant) == Plan(0.7, 0.1)


@settings(max_examples=60, deadline=None)
@given(
    warmup=st.floats(0, 20),
    length=st.floats(0.1, 200),
    plateaus=st.integers(1, 12),
    keep=st.floats(0.05, 1),
    epochs=st.integers(1, 300),
    method=st.sampled_from(sorted(PLANS)),
    at=st.floats(0, 1),
)
def test_between_two_changes_the_plan_stays(warmup, length, plateaus, keep, epochs, method, at):
    args = {"keep_tokens": keep, "keep_connections": 0.3, "warmup": warmup, "length": length, "plateaus": plateaus}
    args |= {"method": method, "stairs": [(length / 3, keep, 1.0), (length, 0.1, 0.1)]}
    found = KeepSchedule(**args).changes(epochs)
    starts = [progress for progress, _ in found]
    assert starts[0] == 0.0 and starts == sorted(set(starts)) and starts[-1] < epochs
    progress = at * epochs * 0.999
    assert KeepSchedule(**args).at(progress) == [p for start, p in found if start <= progress][-1]


def test_what_makes_no_plan_is_refused():
    with pytest.raises(ValueError, match=r"plan.method='cos': unknown; there are constant, cosine, staircase"):
        KeepSchedule(method="cos")
    for stairs in ((), [(5, 0.5, 1.0), (5, 0.4, 1.0)]):
        with pytest.raises(ValueError, match="epochs rising"):
            KeepSchedule(method="staircase", stairs=stairs)
    with pytest.raises(ValueError, match=r"keep_tokens=0.0 is outside \(0, 1\]"):
        KeepSchedule(method="constant", keep_tokens=0.0)
