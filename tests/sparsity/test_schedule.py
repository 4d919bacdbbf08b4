"""Plans as pure functions of progress: golden values of the cosine, plateaus, stairs, and the list of changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.plan_mix import PlanMix
from sparsity.schedule import PLANS, Constant, Cosine, DenseSparse, DenseSparseEpochs, KeepSchedule, Staircase
from sparsity.types import DENSE, Plan
from tests.support.methods import fitting

FINAL = Plan(0.7, 0.1)


def tri_level(plateaus: int) -> KeepSchedule:
    return KeepSchedule(Cosine(warmup=10.0, length=100.0, plateaus=plateaus), FINAL)


@pytest.mark.parametrize(
    ("epoch", "tokens", "connections"),
    [(0, 1, 1), (9.99, 1, 1), (35, 0.956, 0.868), (60, 0.85, 0.55), (85, 0.744, 0.232), (110, 0.7, 0.1), (299, 0.7, 0.1)],
)
def test_the_cosine_of_the_papers_code(epoch, tokens, connections):
    found = tri_level(0).at(epoch)
    assert (found.keep_tokens, found.keep_connections) == pytest.approx((tokens, connections), abs=5e-4)


@pytest.mark.parametrize("plateaus", [7, 8])
def test_plateaus_are_few_and_cost_what_the_curve_costs(plateaus):
    values = [tri_level(plateaus).at(epoch / 8) for epoch in range(8 * 300)]
    assert len(set(values)) == plateaus + 2  # dense, those on the way, the end
    assert values == sorted(values, key=lambda p: -p.keep_tokens)
    smooth = [tri_level(0).at(epoch / 8) for epoch in range(8 * 300)]
    for name in ("keep_tokens", "keep_connections"):
        assert sum(getattr(p, name) for p in values) == pytest.approx(sum(getattr(p, name) for p in smooth), rel=1e-3)


def test_changes_of_a_cosine():
    found = tri_level(4).changes(300)
    assert [progress for progress, _ in found] == [0, 10, 35, 60, 85, 110]
    assert found[0][1] == PlanMix.of(DENSE) and found[-1][1] == PlanMix.of(FINAL)
    assert [progress for progress, _ in tri_level(4).changes(50)] == [0, 10, 35]  # a run that ends before the schedule


def test_constant_and_stairs():
    assert KeepSchedule(Constant(), Plan(0.5)).at(0) == Plan(0.5, 1.0)
    assert KeepSchedule(Constant(), Plan(0.5)).changes(10) == [(0.0, PlanMix.of(Plan(0.5, 1.0)))]
    course = KeepSchedule(Staircase(((2.0, 0.9, 1.0), (5.0, 0.5, 0.25))))
    assert [course.at(e) for e in (1.99, 2, 4.9, 7)] == [DENSE, Plan(0.9), Plan(0.9), Plan(0.5, 0.25)]
    plans = ((0.0, DENSE), (2.0, Plan(0.9)), (5.0, Plan(0.5, 0.25)))
    assert course.changes(10) == [(progress, PlanMix.of(plan)) for progress, plan in plans]


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
    table = {"warmup": warmup, "length": length, "plateaus": plateaus}
    table |= {"stairs": ((length / 3, keep, 1.0), (length, 0.1, 0.1))}
    course = KeepSchedule(fitting(PLANS, method, **table), Plan(keep, 0.3))
    found = course.changes(epochs)
    starts = [progress for progress, _ in found]
    assert starts[0] == 0.0 and starts == sorted(set(starts)) and starts[-1] < epochs
    progress = at * epochs * 0.999
    assert course.mix(progress) == [p for start, p in found if start <= progress][-1]


def test_what_makes_no_plan_is_refused():
    for stairs in ((), ((5, 0.5, 1.0), (5, 0.4, 1.0))):
        with pytest.raises(ValueError, match="epochs rising"):
            Staircase(stairs)
    with pytest.raises(ValueError, match=r"plan.stairs=\(\(1, 0.0, 1.0\),\): entry 0: entry 1: must be > 0 and <= 1"):
        Staircase(((1, 0.0, 1.0),))
    with pytest.raises(ValueError, match=r"plan.warmup=-1: must be >= 0; plan.plateaus='8': must be a number"):
        Cosine(warmup=-1, plateaus="8")
    with pytest.raises(ValueError, match=r"keep_tokens=0.0 is outside \(0, 1\]"):
        Plan(keep_tokens=0.0)


def test_drawn_plans_take_their_shares_and_are_keyed_by_the_step():
    """SaiT: half of the steps dense, the others a density from the list; 12,000 draws: 4 sigma of a share of 1/2 are .018."""
    schedule = KeepSchedule(DenseSparse(), Plan(0.45), connections=False)
    plans = schedule.mix(3.7)
    drawn = [plans.draw(seed=5, step=step) for step in range(12_000)]
    assert (
        drawn[:50] == [schedule.mix(9.1).draw(seed=5, step=step) for step in range(50)] != [plans.draw(6, s) for s in range(50)]
    )
    for share, plan in ((1 / 2, DENSE), (1 / 6, Plan(0.35)), (1 / 6, Plan(0.5)), (1 / 6, Plan(0.7))):
        assert drawn.count(plan) / len(drawn) == pytest.approx(share, abs=0.018)
    assert plans.keep_tokens == pytest.approx(0.5 + (0.35 + 0.5 + 0.7) / 6)
    assert schedule.at(3.7) == Plan(0.45), "evaluations use the final plan"
    assert len(schedule.changes(30)) == 1


def test_the_epoch_form_alternates():
    schedule = KeepSchedule(DenseSparseEpochs((0.5,)), Plan(0.5))
    assert [schedule.mix(e).draw(0, 0) for e in (0, 0.99, 1, 1.5, 2, 3)] == [
        DENSE,
        DENSE,
        Plan(0.5),
        Plan(0.5),
        DENSE,
        Plan(0.5),
    ]
    assert [progress for progress, _ in schedule.changes(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("densities", [(), (0.5, 1.0), (0.5, 0.5)])
def test_densities_of_a_draw_are_distinct_and_sparse(densities):
    with pytest.raises(ValueError, match="use distinct keep ratios of tokens below 1"):
        DenseSparse(densities=densities)
