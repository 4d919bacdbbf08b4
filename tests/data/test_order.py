"""The order is exact: nothing lost, nothing twice, on any world size, worker, repeat count, home count and keep mask."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.keyed_hash import hashed, permutation
from trainer.data.loader.shuffle_quality import Quality, runs_of_class, shuffle_quality
from trainer.data.order import EpochOrder, Layout, micro_batches, slice_of

WORLDS = (1, 2, 3, 4, 8, 16, 24, 64)
SHARDS = {
    "equal": [25] * 16,
    "ragged": [1, 90, 0, 33, 140, 7, 64, 2, 55],
    "one_example": [1] * 400,
    "few": [400],
}
KEEPS = ("all", "share", "holes", "exactly_a_batch")


def packed(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, bitorder="little")


def a_mask(kind: str, n: int, batch: int) -> np.ndarray | None:
    rng = np.random.default_rng(len(kind) + n)
    if kind == "all":
        return None
    if kind == "share":
        return rng.random(n) < 0.8
    if kind == "holes":  # whole shards gone
        return (np.arange(n) // 37) % 3 != 1
    mask = np.zeros(n, dtype=bool)
    mask[rng.permutation(n)[:batch]] = True
    return mask


def whole_epoch(order: EpochOrder) -> tuple[np.ndarray, np.ndarray]:
    rows = [order.rows(step) for step in range(order.steps)]
    return np.stack([r.ids for r in rows]), np.stack([r.copies for r in rows])


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("homes", [1, 3])
@pytest.mark.parametrize("kind", KEEPS)
@pytest.mark.parametrize("shards", SHARDS)
def test_every_kept_example_exactly_once(shards: str, kind: str, homes: int, repeats: int) -> None:
    sizes = np.array(SHARDS[shards])
    n, batch = int(sizes.sum()), 24
    mask = a_mask(kind, n, batch)
    keep = None if mask is None else packed(mask)
    wanted = np.arange(n) if mask is None else np.flatnonzero(mask)
    layout = Layout(sizes, seed=3, batch=batch, lanes=4, window=16, homes=homes, repeats=repeats)
    shown: Counter[int] = Counter()
    for epoch in range(repeats, 2 * repeats):
        try:
            order = EpochOrder(layout, epoch, keep)
        except ValueError:
            assert kind == "exactly_a_batch" and repeats > 1
            return
        ids, copies = whole_epoch(order)
        left = order.leftover()
        assert order.num_kept == len(wanted)
        assert len(left) * repeats < batch
        for row, copy in zip(ids, copies, strict=True):
            for one, count in Counter(row.tolist()).items():
                assert count == repeats and sorted(copy[row == one]) == list(range(repeats))
            assert (row[0::2] != row[1::2]).all(), "neighbours are mixed: never two copies of one image"
        presented = Counter(ids.ravel().tolist())
        assert not set(presented) & set(left.tolist())
        shown.update(presented)
        shown.update({int(i): repeats for i in left})
    assert shown == Counter(dict.fromkeys(wanted.tolist(), repeats))


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_and_workers_are_not_in_the_order(world: int, workers: int) -> None:
    sizes, batch = np.array(SHARDS["ragged"]), 128
    keep = packed(np.random.default_rng(0).random(int(sizes.sum())) < 0.9)
    layout = Layout(sizes, seed=1, batch=batch, lanes=8, window=20)
    reference, _ = whole_epoch(EpochOrder(layout, 5, keep))
    bounds = [slice_of(batch, world, rank) for rank in range(world)]
    assert bounds[0][0] == 0 and bounds[-1][1] == batch
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert all(a % 2 == 0 and b % 2 == 0 and b > a for a, b in bounds)
    slots = micro_batches(batch, 10, world)
    longest = max(b - a for a, b in bounds)
    assert slots.micro_batch <= 10 and slots.micro_batch % 2 == 0
    assert slots.slots == slots.micro_batch * slots.accumulation >= longest > slots.slots - 2 * slots.accumulation
    for start, stop in bounds:
        for worker in range(max(workers, 1)):
            order = EpochOrder(layout, 5, keep)  # each worker has its own, reads its batches in turn
            for step in range(worker, order.steps, max(workers, 1)):
                assert (order.rows(step, start, stop).ids == reference[step, start:stop]).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_laws_on_any_shape(data: st.DataObject) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=30)))
    lanes, repeats = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    batch = 2 * lanes * repeats * data.draw(st.integers(1, 3))
    seed, epoch = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 9))
    window, homes = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 4))
    mask = np.random.default_rng(seed).random(int(sizes.sum())) < data.draw(st.floats(0.1, 1.0))
    layout = Layout(sizes, seed, batch, lanes, window, homes, repeats)
    try:
        order = EpochOrder(layout, epoch, packed(mask))
    except ValueError:
        assert mask.sum() < batch + lanes * repeats
        return
    ids, _ = whole_epoch(order)
    seen = np.concatenate([np.unique(ids), order.leftover()])
    assert len(np.unique(seen)) == len(seen) and mask[seen].all()
    assert order.steps == len(seen) * repeats // batch
    step = data.draw(st.integers(0, order.steps - 1))  # entering anywhere is the same as having walked there
    a = data.draw(st.integers(0, batch))
    b = data.draw(st.integers(a, batch))
    assert (EpochOrder(layout, epoch, packed(mask)).rows(step, a, b).ids == ids[step, a:b]).all()


def test_epochs_and_seeds_differ_and_leftovers_move() -> None:
    sizes = np.array([500])

    def order(seed: int, epoch: int) -> EpochOrder:
        return EpochOrder(Layout(sizes, seed, batch=64, lanes=4, window=32), epoch)

    assert (whole_epoch(order(0, 0))[0] == whole_epoch(order(0, 0))[0]).all()
    assert (whole_epoch(order(0, 0))[0] != whole_epoch(order(0, 1))[0]).mean() > 0.9
    assert (whole_epoch(order(0, 0))[0] != whole_epoch(order(1, 0))[0]).mean() > 0.9
    missed = Counter(i for e in range(40) for i in order(0, e).leftover().tolist())
    assert len(missed) > 400 and max(missed.values()) < 20, "the same examples must not be left over again and again"


def test_order_is_the_stored_one() -> None:
    """A change of the order breaks resume and replay of old runs: it must be wanted. Numbers written by this code."""
    layout = Layout(np.array([5, 9, 3, 7]), seed=42, batch=6, lanes=3, window=4, homes=2)
    keep = packed(np.arange(24) % 5 != 0)
    assert hashed(1, np.arange(3)).tolist() == [13985836591153480016, 17884930423024832174, 9248681918770584897]
    assert permutation(6, 7).tolist() == [2, 0, 3, 4, 1, 5]
    assert whole_epoch(EpochOrder(layout, 2, keep))[0].tolist() == STORED


STORED = [[21, 9, 22, 11, 4, 14], [23, 8, 17, 7, 16, 3], [19, 12, 18, 6, 2, 1]]


def test_a_rank_touches_its_lanes_only() -> None:
    layout = Layout(np.full(64, 100), seed=0, batch=64, lanes=16, window=64)
    order = EpochOrder(layout, 0)
    start, stop = slice_of(64, 8, 3)
    shards = {int(i) // 100 for step in range(order.steps) for i in order.rows(step, start, stop).ids}
    assert len(shards) <= 64 // 8 + 2
    assert set(order._windows) == {6, 7}


@pytest.mark.parametrize("kind", KEEPS[:3])
@pytest.mark.parametrize("shards", SHARDS)
def test_the_shards_of_a_window_are_those_of_its_examples(shards: str, kind: str) -> None:
    """No shard more: a window that ends at the border of two shards does not name the second one, which would be downloaded for nothing."""
    sizes = np.array(SHARDS[shards])
    mask = a_mask(kind, int(sizes.sum()), 24)
    layout = Layout(sizes, seed=3, batch=24, lanes=4, window=25)
    order, borders = EpochOrder(layout, 1, None if mask is None else packed(mask)), 0
    for lane in range(4):
        for window in range(int(order.window_at(order.steps - 1)[lane]) + 1):
            named = order.shards_of(lane, window).tolist()
            assert (
                sorted(set(named))
                == np.unique(np.searchsorted(layout.first, order.window_of(lane, window), "right") - 1).tolist()
            )
            spans = order._spans(lane, window)
            borders += sum(end > begin and end in order._starts for begin, end in spans)
    assert borders or len(sizes) == 1, "no window ends at a border: the case is not tested"


def test_homes_stay_together() -> None:
    layout = Layout(np.full(64, 50), seed=0, batch=64, lanes=8, window=64, homes=4)
    for epoch in range(3):
        order = EpochOrder(layout, epoch)
        for rank in range(4):  # one rank per node, one home per node
            a, b = slice_of(64, 4, rank)
            ids = np.concatenate([order.rows(s, a, b).ids for s in range(order.steps)])
            assert (layout.home[ids // 50] == rank).mean() > 0.95


def test_homes_are_dealt_by_the_seed_in_equal_numbers() -> None:
    homes = [Layout(np.full(64, 50), seed, batch=64, lanes=8, window=64, homes=4).home for seed in (0, 0, 1)]
    assert (homes[0] == homes[1]).all() and (homes[0] != homes[2]).mean() > 0.5
    assert all(np.bincount(home).tolist() == [16] * 4 for home in homes)


@pytest.mark.parametrize(("batch", "lanes", "repeats"), [(6, 3, 2), (10, 5, 2), (20, 5, 4), (18, 3, 2), (8, 2, 2), (12, 3, 4)])
def test_neighbours_are_never_copies_of_one_image(batch: int, lanes: int, repeats: int) -> None:
    """Also where a batch has an odd number of distinct images: the last three of them take turns."""
    layout = Layout(np.array([70, 90]), seed=1, batch=batch, lanes=lanes, window=16, repeats=repeats)
    for epoch in range(2):
        order = EpochOrder(layout, epoch)
        ids, copies = whole_epoch(order)
        assert len(np.unique(ids)) == ids.size // repeats, "an image is in one batch only"
        for row, copy in zip(ids, copies, strict=True):
            assert (row[0::2] != row[1::2]).all()
            shown = Counter(zip(row.tolist(), copy.tolist(), strict=True))
            assert len(shown) == batch, "each copy once"
            assert sorted(shown) == [(int(i), c) for i in np.unique(row) for c in range(repeats)]


def test_refusals_name_the_setting() -> None:
    sizes = np.array([10, 10])
    with pytest.raises(ValueError, match=r"lanes x repeats"):
        Layout(sizes, 0, batch=10, lanes=4, window=8)
    with pytest.raises(ValueError, match=r"data.batch=3 with data.repeats=3"):
        Layout(sizes, 0, batch=3, lanes=1, window=8, repeats=3)
    with pytest.raises(ValueError, match=r"20 kept examples are too few for a batch of data.batch=32"):
        EpochOrder(Layout(sizes, 0, batch=32, lanes=4, window=8), 0)
    with pytest.raises(ValueError, match="another data set"):
        EpochOrder(Layout(sizes, 0, batch=4, lanes=2, window=8), 0, np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match=r"data.batch=4 on 3 processes"):
        slice_of(4, 3, 0)
    with pytest.raises(ValueError, match=r"micro_batch=3"):
        micro_batches(64, 3, 2)


def test_shuffle_quality_is_measured() -> None:
    sizes, batch = np.full(40, 100), 64
    sorted_by_class, mixed = np.arange(4000) // 100, np.random.default_rng(0).integers(0, 40, 4000)
    keep = packed(np.random.default_rng(1).random(4000) < 0.7)

    def quality(labels: np.ndarray, window: int, repeats: int = 1) -> Quality:
        return shuffle_quality(EpochOrder(Layout(sizes, 0, batch, 4, window, repeats=repeats), 0, keep), labels)

    assert all(0.8 < value < 1.25 for value in (quality(mixed, 16).classes, quality(mixed, 16, repeats=2).pairs))
    whole = shuffle_quality(EpochOrder(Layout(sizes, 0, batch, 1, 4000), 0, keep), sorted_by_class)
    assert all(0.7 < value < 1.3 for value in whole), "one lane, one window: a full shuffle"
    bad = quality(sorted_by_class, 16)
    assert bad.classes > 3 and bad.shards > 3, "a window shorter than a shard shows"
    assert bad.pairs < 2, "but not in mixup's pairs: they come from different lanes"
    worst = shuffle_quality(EpochOrder(Layout(sizes, 0, batch, 1, 16), 0, keep), sorted_by_class)
    assert worst.pairs > 10 and "raise data.window" in worst.text() and "raise" not in whole.text()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_world_and_any_workers_resume_anywhere(data: st.DataObject) -> None:
    """A run that stops at any position and continues with other processes and workers presents what an uninterrupted one does."""
    sizes = np.array(data.draw(st.sampled_from(list(SHARDS.values()))))
    lanes, repeats, homes = (data.draw(st.sampled_from(choice)) for choice in ((1, 2, 4, 8), (1, 3), (1, 3, 7)))
    batch = lanes * repeats * 2 * -(-64 // (lanes * repeats))
    mask = a_mask(data.draw(st.sampled_from(KEEPS[:3])), int(sizes.sum()), batch)
    keep = None if mask is None else packed(mask)
    layout = Layout(sizes, data.draw(st.integers(0, 99)), batch, lanes, data.draw(st.integers(1, 90)), homes, repeats)
    order = EpochOrder(layout, data.draw(st.integers(0, 5)), keep)
    whole, _ = whole_epoch(order)
    stop = data.draw(st.integers(0, order.steps))
    for first, last in ((0, stop), (stop, order.steps)):
        world, workers = data.draw(st.sampled_from(WORLDS)), data.draw(st.sampled_from((1, 2, 5)))
        rank = data.draw(st.integers(0, world - 1))
        a, b = slice_of(batch, world, rank)
        for worker in range(workers):
            again = EpochOrder(layout, order.epoch, keep)
            for step in range(first + worker, last, workers):
                assert (again.rows(step, a, b).ids == whole[step, a:b]).all()


def test_set_up_does_not_grow_with_examples_in_python() -> None:
    """1.28 M examples in 1,024 shards, dropping active: set-up and ten batches of a middle rank, well under a second each."""
    sizes = np.full(1024, 1251)
    keep = packed(np.random.default_rng(0).random(int(sizes.sum())) < 0.8)
    begin = time.perf_counter()
    order = EpochOrder(Layout(sizes, 0, batch=1024, lanes=16, window=4096), 7, keep)
    a, b = slice_of(1024, 8, 4)
    for step in range(order.steps // 2, order.steps // 2 + 10):
        order.rows(step, a, b)
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize("first", [[0, 2, 4], [0, 0, 2, 4], [0, 2, 2, 4, 4]])
def test_neighbours_of_one_class_are_counted_inside_shards(first: list[int]) -> None:
    """Empty shards, at either end too, have no neighbours."""
    index = build_index_of([0, 0, 1, 1], first)
    assert runs_of_class(index) == (1.0, pytest.approx(1 / 3))
    assert runs_of_class(build_index_of([0, 1, 1, 0], first))[0] == 0.0


def build_index_of(labels: list[int], first: list[int]) -> Any:
    class Few:
        def __len__(self) -> int:
            return len(labels)

    found: Any = Few()
    found.labels, found.first = np.array(labels), np.array(first)
    return found
