"""Forgetting on a table made by hand, its updates, and InfoBatch's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsity.examples import kept_ids
from sparsity.examples.curriculum import Draw
from sparsity.examples.forgetting import Forgetting
from sparsity.types import Observation, single_process
from tests.support.methods import curriculum


def observe(method, ids, correct, spread=None, loss=None, valid=None) -> None:
    n = len(ids)
    method.observe(
        torch.tensor(ids),
        Observation(
            torch.tensor(correct, dtype=torch.bool),
            torch.tensor(loss or [0.0] * n, dtype=torch.float32),
            torch.tensor(spread or [0.0] * n, dtype=torch.float32),
            torch.tensor(valid or [True] * n, dtype=torch.bool),
        ),
    )


# one row per example: what it was at its presentations (1 right, 0 wrong, - not shown), events, score
TABLE = [
    ("11111", 0, 0.0),
    ("00111", 0, 0.0),
    ("10101", 2, 0.5),
    ("10000", 1, 0.25),
    ("00000", 0, np.inf),
    ("01010", 2, 0.5),
    ("1-0-1", 1, 0.5),
    ("11---", 0, np.nan),
    ("-0000", 0, np.inf),
    ("10-10", 2, 2 / 3),
    ("-----", 0, np.nan),
    ("1---1", 0, np.nan),
]


def play(method, table, spread=None) -> None:
    for epoch in range(max(len(row) for row in table)):
        shown = [i for i, row in enumerate(table) if row[epoch] != "-"]
        method.select(epoch, single_process)
        # each example has a second copy with the opposite result: only the first counts
        ids = [i for i in shown for _ in range(2)]
        correct = [bool(int(table[i][epoch])) != copy for i in shown for copy in (False, True)]
        observe(method, ids, correct, [spread[i] for i in ids] if spread else None, valid=[True, False] * len(shown))


def test_events_and_scores_of_the_table():
    n = len(TABLE)
    method = curriculum("forgetting", np.zeros(n, np.int32), epochs=9)
    play(method, [row[0] for row in TABLE])
    state = method.state_dict(single_process)
    assert state["events"].tolist() == [row[1] for row in TABLE]
    assert state["seen"].tolist() == [5 - row[0].count("-") for row in TABLE]
    np.testing.assert_array_equal(method.scores(), [row[2] for row in TABLE])


def swapping(n, **changes) -> Forgetting:
    given = {"epochs": 99, "removed": 0.25, "swap": 0.25, "window": 5.0, "updates": 2}
    return curriculum("forgetting", np.arange(n) % 2, **given | changes)


def test_the_least_forgotten_go_lowest_spread_first_then_lowest_id():
    method = swapping(40)
    start = method.active.copy()
    active, pool = np.flatnonzero(start), np.flatnonzero(~start)
    # 4 forgotten once, 4 never right, the rest never forgotten: the 10 go by spread, then id
    table = ["11111"] * 40
    for i in active[:4]:
        table[i] = "11011"
    for i in active[4:8]:
        table[i] = "00000"
    for i in pool:
        table[i] = "-----"
    spread = [0.5] * 40
    for i in active[-9:]:
        spread[i] = 0.1
    play(method, table, spread)
    selection = method.select(5, single_process)
    gone = set(np.flatnonzero(start & ~method.active))
    assert gone == {*active[-9:], active[8]}
    assert set(pool) <= set(kept_ids(selection, 40)) and selection.num_kept == 30
    assert selection.facts["swapped"] == 10 and selection.facts["update"] == 1
    assert selection.facts["never_learned"] == 4 and selection.facts["unforgettable"] == 22
    assert not method.seen.any() and not method.events.any() and not method.memory.any() and not method.spread.any()


def test_ties_go_by_the_mean_spread_however_often_an_example_was_shown():
    """Shown 3 times at .3 (sum .9) it varies less than shown 5 times at .2 (sum 1.0) ... and leaves after it."""
    method = swapping(40)
    active = np.flatnonzero(method.active)
    often, seldom = active[:10], active[10:20]
    for epoch in range(5):
        method.select(epoch, single_process)
        shown = np.concatenate([often, active[20:]] if epoch >= 3 else [active])
        spread = np.where(np.isin(shown, often), 0.2, np.where(np.isin(shown, seldom), 0.3, 0.9))
        observe(method, shown.tolist(), [True] * len(shown), spread=spread.tolist())
    before = method.active.copy()
    method.select(5, single_process)
    assert set(np.flatnonzero(before & ~method.active)) == set(often)


def test_each_update_draws_other_places_of_the_pool():
    """Two updates over pools of one size: draws without the number of the update would bring back the same places."""
    places = []
    method = swapping(400, removed=0.5, swap=0.05, updates=2)
    for epoch in range(11):
        pool, before = np.flatnonzero(~method.active), method.active.copy()
        method.select(epoch, single_process)
        if (back := method.active & ~before).any():
            places.append(np.flatnonzero(back[pool]).tolist())
        observe(method, np.flatnonzero(method.active).tolist(), [True] * 200)
    assert [len(place) for place in places] == [20, 20]
    assert len(set(places[0]) & set(places[1])) < 10


def test_the_never_trained_of_a_large_pool_come_back_in_the_order_drawn():
    """Sorted by whether they were trained, and in the drawn order within: a sort that is not stable mixes pools beyond 16."""
    method = swapping(2000, removed=0.5, swap=0.1, updates=3, restore="never_trained")
    for epoch in range(16):
        pool, before = np.flatnonzero(~method.active), method.active.copy()
        trained = np.unpackbits(method.trained, count=2000, bitorder="little").astype(bool)
        method.select(epoch, single_process)
        if (method.active & ~before).any():
            drawn = method._draw(Draw.RESTORED, method.updated).permutation(pool)
            expected = [i for i in drawn if not trained[i]] + [i for i in drawn if trained[i]]
            assert set(np.flatnonzero(method.active & ~before)) == set(expected[:200])
        observe(method, np.flatnonzero(method.active).tolist(), [True] * 1000)
    assert method.updated == 3


def test_ties_by_id_alone():
    method = swapping(40, ties="id")
    assert not method.wants_spread and swapping(40).wants_spread
    active = np.flatnonzero(method.active)
    for epoch in range(5):
        method.select(epoch, single_process)
        observe(method, active.tolist(), [True] * 30, spread=list(range(30, 0, -1)))
    before = method.active.copy()
    method.select(5, single_process)
    assert np.flatnonzero(before & ~method.active).tolist() == active[:10].tolist()


def test_never_learned_and_rarely_shown_examples_stay_even_if_fewer_are_swapped():
    method = swapping(40)
    active = np.flatnonzero(method.active)
    for epoch in range(5):
        method.select(epoch, single_process)
        observe(method, active[:27].tolist(), [False] * 20 + [True] * 7)
        if epoch < 2:
            observe(method, active[27:].tolist(), [True] * 3)
    before = method.active.copy()
    selection = method.select(5, single_process)
    assert np.flatnonzero(before & ~method.active).tolist() == active[20:27].tolist()
    assert selection.facts["swapped"] == 7 and selection.num_kept == 30 and selection.facts["scored"] == 7


def test_swaps_happen_at_the_window_borders_only_and_active_and_pool_stay_a_partition():
    method = swapping(200, swap=0.05, window=4.0, updates=3)
    changed, sets = [], []
    for epoch in range(24):
        selection = method.select(epoch, single_process)
        ids = kept_ids(selection, 200)
        assert len(set(ids)) == selection.num_kept == 150  # the pool is the rest: disjoint, and the union is all
        if sets and set(ids) != sets[-1]:
            changed.append(epoch)
            assert len(sets[-1] - set(ids)) == len(set(ids) - sets[-1]) == 10 == selection.facts["swapped"]
        else:
            assert selection.facts["swapped"] == 0
        sets.append(set(ids))
        observe(method, ids.tolist(), [True] * 150)
    assert changed == [4, 8, 12]


def test_what_comes_back_is_a_random_part_of_the_pool_that_depends_on_the_seed():
    returned = []
    for seed in (0, 0, 1):
        method = swapping(200, swap=0.05, seed=0)
        method.seed = seed
        pool = np.flatnonzero(~method.active)
        ids = np.flatnonzero(method.active).tolist()
        for epoch in range(5):
            method.select(epoch, single_process)
            observe(method, ids, [True] * 150)
        method.select(5, single_process)
        returned.append([i for i in pool if method.active[i]])
        assert len(returned[-1]) == 10 and returned[-1] != pool[:10].tolist()
    assert returned[0] == returned[1] != returned[2]


def test_the_papers_counts_at_imagenet():
    settings = {"removed": 0.2, "swap": 0.05, "window": 30.0, "updates": 5}
    method = curriculum("forgetting", np.zeros(1_281_167, np.int32), epochs=300, **settings)
    assert (method.num_removed, method.num_swap) == (256_233, 64_058)
    assert method.active.sum() == 1_281_167 - 256_233


def test_large_ids_survive_the_gather():
    """1281166 is 1277952 in bfloat16: ids must never travel as floats."""
    n = 1_281_167
    method = curriculum("infobatch", np.zeros(n, np.int32), epochs=3, removed=0.5)
    observe(method, [n - 1, n - 2], [True, True], loss=[0.25, 0.75])

    def gather(tensor):
        return tensor if tensor.dtype == torch.int64 else tensor.bfloat16().float()  # what a gather in bfloat16 would do

    state = method.state_dict(gather)
    assert np.flatnonzero(np.isfinite(state["loss"])).tolist() == [n - 2, n - 1]
    assert state["loss"][-2:].tolist() == [0.75, 0.25]


def test_infobatch_prunes_below_the_mean_and_keeps_the_sum_of_weights():
    n = 1000
    method = curriculum("infobatch", np.arange(n) % 10, epochs=10, removed=0.5, anneal=0.2, seed=4)
    loss = np.random.default_rng(0).gamma(2.0, size=n).astype(np.float32)
    first = method.select(0, single_process)
    assert first.num_kept == n and first.weight is None  # nothing is known yet
    previous = None
    for epoch in range(1, 8):
        shown = kept_ids(first, n) if epoch == 1 else previous
        observe(method, shown.tolist(), [True] * len(shown), loss=loss[shown].tolist())
        selection = method.select(epoch, single_process)
        keep = np.zeros(n, bool)
        keep[kept_ids(selection, n)] = True
        below = loss < loss.astype(np.float64).mean()
        assert np.all(keep[~below]) and (below & ~keep).sum() == int(0.5 * below.sum())
        assert selection.weight is not None
        assert np.all(selection.weight[~below] == 1) and np.allclose(selection.weight[below], 2.0, rtol=5e-3)
        assert selection.weight[keep].sum() == pytest.approx(n, rel=1e-6)
        assert previous is None or set(previous) != set(np.flatnonzero(keep))  # drawn anew each epoch
        previous = np.flatnonzero(keep)
    assert method.select(8, single_process).num_kept == n and method.select(8, single_process).weight is None


def test_infobatch_prunes_nothing_where_all_losses_are_the_mean():
    method = curriculum("infobatch", np.zeros(8, np.int32), epochs=10, removed=0.5)
    observe(method, list(range(8)), [True] * 8, loss=[0.5] * 8)
    selection = method.select(1, single_process)
    assert selection.num_kept == 8 and selection.weight is None and selection.facts["below_mean"] == 0


def test_infobatch_leaves_what_it_has_not_seen():
    method = curriculum("infobatch", np.zeros(10, np.int32), epochs=10, removed=0.9)
    observe(method, [0, 1, 2, 3], [True] * 4, loss=[0.0, 0.0, 0.0, 9.0])
    selection = method.select(1, single_process)
    assert set(range(3, 10)) <= set(kept_ids(selection, 10)) and selection.num_kept == 8
    assert selection.weight is not None and selection.weight[:3].tolist() == [3.0] * 3


def test_the_never_trained_come_back_first():
    """All examples of the first pool come back before any comes back twice; also over a resume."""
    method = swapping(40, removed=0.5, swap=0.25, updates=3, restore="never_trained")
    first_pool, returned = set(np.flatnonzero(~method.active)), []
    for epoch in range(16):
        before = method.active.copy()
        method.select(epoch, single_process)
        if back := set(np.flatnonzero(method.active & ~before)):
            returned.append(back)
        observe(method, np.flatnonzero(method.active).tolist(), [True] * 20)
        if epoch == 7:
            resumed = swapping(40, removed=0.5, swap=0.25, updates=3, restore="never_trained")
            resumed.load_state_dict(method.state_dict(single_process))
            method = resumed
    assert len(returned) == 3 and returned[0] | returned[1] == first_pool
    assert "trained" not in swapping(40).state_dict(single_process)
