"""Level 1: every method keeps the protocol; what is shown is the same on all ranks, any world size, and over a resume."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsity.examples import EXAMPLES, kept_ids
from sparsity.examples.by_class import first_per_group, quotas
from sparsity.examples.curriculum import TrainingRun
from sparsity.types import Observation, Selection, single_process
from tests.support.methods import fitting

N, CLASSES, EPOCHS = 203, 7, 18
LABELS = np.random.default_rng(5).integers(0, CLASSES, N).astype(np.int32)
SETTINGS = {"seed": 3, "removed": 0.2, "swap": 0.05, "window": 4.0, "updates": 3, "epochs": EPOCHS, "anneal": 0.1}
METHODS = sorted(EXAMPLES)


def make(name, labels=LABELS, **changes):
    given = SETTINGS | changes
    run = TrainingRun(len(labels), labels, given["epochs"], given["seed"], given.get("repeats", 1), given.get("probe_share"))
    return fitting(EXAMPLES, name, **given).build(run)


def outcomes(epoch: int, ids: np.ndarray) -> Observation:
    """Made-up results of training: they depend on epoch and example, not on the rank. Some examples are harder than others."""
    noise = np.random.default_rng((11, epoch)).random((3, N))
    ease = np.random.default_rng(12).random(N)
    correct = noise[0] < ease * 1.2
    rows = [torch.from_numpy(x[ids]) for x in (correct, (1 - ease + noise[1]).astype(np.float32), noise[2].astype(np.float32))]
    return Observation(rows[0], rows[1], rows[2], torch.ones(len(ids), dtype=torch.bool))


def show(method, selection: Selection, epoch: int, rank=0, world=1, start=0, stop=None, batch=16) -> None:
    """Present one rank's slices of the global batches [start, stop) of an epoch, with a padding row in each step."""
    order = np.random.default_rng((13, epoch)).permutation(kept_ids(selection, N))
    for first in range(0, len(order), batch)[start:stop]:
        ids = np.array_split(order[first : first + batch], world)[rank]
        outcome = outcomes(epoch, np.append(ids, 0))
        outcome.valid[-1] = False  # a padding row names example 0: it must not count
        method.observe(torch.from_numpy(np.append(ids, 0)), outcome)


def run(name, epochs=range(EPOCHS), rank=0, world=1, gather=single_process, method=None, **changes):
    method = method or make(name, **changes)
    selections = []
    for epoch in epochs:
        selections.append(method.select(epoch, gather))
        show(method, selections[-1], epoch, rank, world)
    return method, selections


class Ranks:
    """A gather between threads: parts in rank order, as the engine gives them."""

    def __init__(self, world: int):
        self.world, self.parts, self.barrier = world, [torch.empty(0)] * world, threading.Barrier(world)

    def gather(self, rank: int):
        def gathered(tensor: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = tensor
            self.barrier.wait(20)
            whole = torch.cat(self.parts)
            self.barrier.wait(20)
            return whole

        return gathered

    def run(self, work) -> list:
        results: list = [None] * self.world
        threads = [
            threading.Thread(target=lambda r=r: results.__setitem__(r, work(r, self.gather(r)))) for r in range(self.world)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k], equal_nan=True) for k in a)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_any_world_size_shows_the_same_and_remembers_the_same(name, world):
    alone_method, alone_selections = run(name)

    def work(rank, gather):
        method, selections = run(name, rank=rank, world=world, gather=gather)
        return selections, method.state_dict(gather)

    for selections, state in Ranks(world).run(work):
        assert [s.facts for s in selections] == [s.facts for s in alone_selections]
        assert same_state(state, alone_method.state_dict(single_process))


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_continues_bit_for_bit_on_another_world_size(name):
    """Saved in the middle of an epoch and of a window on two ranks; resumed on one rank, by a new object."""
    middle = 6
    whole, selections = run(name)

    def first_half(rank, gather):
        method, _ = run(name, range(middle), rank, 2, gather)
        selection = method.select(middle, gather)
        show(method, selection, middle, rank, 2, stop=5)
        return method.state_dict(gather), method, selection

    (state, _, selection), (other, *_) = Ranks(2).run(first_half)
    assert same_state(state, other)
    resumed = make(name)
    resumed.load_state_dict({k: v.copy() for k, v in state.items()})
    show(resumed, selection, middle, start=5)
    _, later = run(name, range(middle + 1, EPOCHS), method=resumed)
    assert [s.facts for s in later] == [s.facts for s in selections[middle + 1 :]]
    assert same_state(resumed.state_dict(single_process), whole.state_dict(single_process))


@pytest.mark.parametrize("name", METHODS)
def test_saving_disturbs_nothing(name):
    whole, selections = run(name)
    method, again = make(name), []
    for epoch in range(EPOCHS):
        again.append(method.select(epoch, single_process))
        show(method, again[-1], epoch, stop=7)
        saved = method.state_dict(single_process)
        for array in saved.values():
            array[...] = 1  # the state returned is a copy
        show(method, again[-1], epoch, start=7)
    assert [s.facts["hash"] for s in again] == [s.facts["hash"] for s in selections]
    assert same_state(method.state_dict(single_process), whole.state_dict(single_process))


@pytest.mark.parametrize("name", METHODS)
def test_facts_describe_the_selection_and_can_be_written_as_json(name):
    _, selections = run(name)
    for epoch, selection in enumerate(selections):
        ids = kept_ids(selection, N)
        facts = json.loads(json.dumps(selection.facts))
        assert facts["method"] == name and facts["kept"] == selection.num_kept == len(ids)
        rates = np.bincount(LABELS[ids], minlength=CLASSES) / np.bincount(LABELS)
        assert facts["class_keep_min"] == rates.min() and facts["class_keep_max"] == rates.max()
        assert {"hash", "swapped", "update"} <= facts.keys()
        assert selection.weight is None or (selection.weight.shape, selection.weight.dtype) == ((N,), np.float32)
        if epoch >= EPOCHS - round(0.1 * EPOCHS):  # annealed: everything, unweighted
            assert len(ids) == N and selection.weight is None
    hashes = {s.facts["hash"]: (s.keep.tobytes(), None if s.weight is None else s.weight.tobytes()) for s in selections}
    assert len(set(hashes.values())) == len(hashes)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_removed_shows_everything(name):
    method, selections = run(name, removed=0.0)
    assert all(s.num_kept == N and s.weight is None for s in selections)
    assert not method.wants_spread


@pytest.mark.parametrize("name", METHODS)
def test_the_second_call_returns_the_same(name):
    method, _ = run(name, range(4))
    selection = method.select(4, single_process)
    show(method, selection, 4, stop=3)
    assert method.select(4, single_process).facts["hash"] == selection.facts["hash"]


@pytest.mark.parametrize("name", METHODS)
def test_observe_never_reads_a_value_back(name):
    """Under fake tensors (shapes, no values) anything that would wait for the device raises."""
    method = make(name)
    with FakeTensorMode():
        rows = [torch.ones(6, dtype=d) for d in (torch.int64, torch.bool, torch.float32)]
        method.observe(rows[0], Observation(rows[1], rows[2], rows[2], rows[1]))


@pytest.mark.parametrize(("name", "restore"), [*((name, "random") for name in METHODS), ("forgetting", "never_trained")])
def test_state_of_imagenet_stays_under_20_megabytes(name, restore):
    """Without the labels, which belong to the index."""
    many = 1_281_167
    labels = np.arange(many, dtype=np.int32) % 1000
    method = make(name, labels, window=30.0, restore=restore)
    ids = torch.arange(500, 628)
    yes, number = torch.ones(128, dtype=torch.bool), torch.ones(128)
    method.observe(ids, Observation(yes, number, number, yes))
    assert method.state_bytes < 20e6


def test_random_fixed_is_one_subset_and_random_epoch_goes_round():
    _, fixed = run("random_fixed", removed=0.7, anneal=0.0)
    assert len({s.facts["hash"] for s in fixed}) == 1 and fixed[0].num_kept == N - round(0.7 * N)
    _, each = run("random_epoch", removed=0.7, anneal=0.0)
    assert len({s.facts["hash"] for s in each}) == EPOCHS and {s.num_kept for s in each} == {N - round(0.7 * N)}
    for cycle in range(0, EPOCHS, 3):  # .3 kept: three epochs share no example
        ids = np.concatenate([kept_ids(s, N) for s in each[cycle : cycle + 3]])
        assert len(set(ids)) == len(ids)


def test_random_subsets_depend_on_the_seed():
    for name in ("random_fixed", "random_epoch", "forgetting"):
        assert (
            make(name, seed=1).select(0, single_process).facts["hash"]
            != make(name, seed=2).select(0, single_process).facts["hash"]
        )


def test_what_is_shown_changes_only_between_rounds_of_repeats():
    """Repeated augmentation shows a third of the kept examples in an epoch, so the selection changes every third epoch only."""
    for name in ("random_epoch", "infobatch", "forgetting"):
        _, selections = run(name, repeats=3, window=9.0, updates=1, anneal=0.0)
        hashes = [s.facts["hash"] for s in selections]
        assert all(hashes[e] == hashes[e - e % 3] for e in range(EPOCHS)) and len(set(hashes)) > 1, name


@pytest.mark.parametrize(
    ("epochs", "anneal", "repeats", "first"),
    [(10, 0.3, 1, 7), (10, 0.3, 3, 9), (12, 0.25, 3, 9), (12, 0.3, 3, 9), (10, 0.0, 3, 12)],
)
def test_everything_is_shown_from_the_first_whole_round_of_the_last_epochs_on(epochs, anneal, repeats, first):
    """The selection does not change inside a round: with rounds of 3, the last 3 of 10 epochs become those from 9 on."""
    method, shown = make("random_epoch", epochs=epochs, anneal=anneal, repeats=repeats), []
    for epoch in range(epochs):
        shown.append(method.select(epoch, single_process).num_kept)
    assert [num == N for num in shown] == [epoch >= first for epoch in range(epochs)]


@pytest.mark.parametrize("name", ["random_fixed", "random_epoch", "forgetting"])
def test_balanced_removes_the_same_share_of_every_class(name):
    _, selections = run(name, balanced=True, anneal=0.0)
    sizes = np.bincount(LABELS)
    assert {s.num_kept for s in selections} == {N - round(0.2 * N)}
    for selection in selections:
        removed = sizes - np.bincount(LABELS[kept_ids(selection, N)], minlength=CLASSES)
        assert np.all(np.abs(removed - 0.2 * sizes) < 1)
    assert len({s.facts["hash"] for s in selections}) == {"random_fixed": 1, "random_epoch": EPOCHS, "forgetting": 4}[name]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_quotas_add_up_and_fit(sizes, total):
    sizes = np.array(sizes)
    shares = quotas(sizes, total)
    assert shares.sum() == min(total, sizes.sum()) and np.all(shares <= sizes) and np.all(shares >= 0)
    if total <= sizes.sum() > 0:
        assert np.all(np.abs(shares - sizes * total / sizes.sum()) < 1)


def test_first_of_each_keeps_the_order_given():
    group = np.array([0, 1, 0, 1, 0, 1, 0])
    ids = np.array([6, 5, 4, 3, 2, 1, 0])
    assert first_per_group(ids, group, np.array([2, 1])).tolist() == [6, 4, 5]
    assert first_per_group(ids, group, np.array([2, 1]), skip=1).tolist() == [2, 0, 3]
    assert first_per_group(ids, group, np.array([2, 1]), skip=2).tolist() == [6, 4, 1]


@pytest.mark.parametrize(
    ("name", "changes", "texts"),
    [
        ("forgetting", {"removed": 0.03}, ["examples.swap=0.05", "examples.removed=0.03", "swap<=0.03"]),
        ("forgetting", {"removed": 0.98, "swap": 0.3}, ["examples.swap=0.3", "only 4 can be"]),
        ("forgetting", {"swap": 0.001}, ["examples.swap=0.001", "203 examples is none"]),
        ("forgetting", {"window": 2.0}, ["examples.window=2ep", "2 time(s)", "window>=3ep"]),
        ("forgetting", {"window": 2.5}, ["examples.window=2.5ep", "try 3ep"]),
        ("forgetting", {"window": 10.0, "repeats": 3}, ["data.repeats=3", "try 9ep"]),
        (
            "forgetting",
            {"window": 8.0, "probe_share": 0.25},
            ["probe_share=0.25", "window=8ep", "2 time(s)", "probe_share>=0.375", "window>=12ep"],
        ),
        ("forgetting", {"window": 2.0, "probe_share": 1.0}, ["probe_share=1", "2 time(s)", "probe_share>=1,", "window>=3ep"]),
        ("random_fixed", {"removed": 0.001}, ["examples.removed=0.001", "0 of 203"]),
        ("random_epoch", {"removed": 0.999}, ["examples.removed=0.999", "203 of 203"]),
        ("forgetting", {"swap": 1.0}, ["examples.swap=1.0: must be >= 0 and < 1"]),
        ("forgetting", {"ties": "loss"}, ["examples.ties='loss': unknown value; valid values: spread, id"]),
        ("infobatch", {"anneal": -0.1}, ["examples.anneal=-0.1: must be >= 0 and < 1"]),
    ],
)
def test_settings_that_cannot_be_met_are_refused_with_a_remedy(name, changes, texts):
    with pytest.raises(ValueError) as refused:
        make(name, **changes)
    for text in texts:
        assert text in str(refused.value)


def test_a_window_whose_probes_are_enough_is_taken_whatever_the_repeats():
    """Repeats present an example in one epoch of three; a probe needs no presentation."""
    assert make("forgetting", window=30.0, probe_share=0.1, epochs=99).probe_share == 0.1
    assert make("forgetting", window=6.0, probe_share=0.5, repeats=3).uses_observations(0)
    with pytest.raises(ValueError, match=r"examples.window=6ep with data.repeats=3"):
        make("forgetting", window=6.0, repeats=3)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="5 labels for 6 examples"):
        EXAMPLES["all"]().build(TrainingRun(6, np.zeros(5, int), epochs=1))


@pytest.mark.parametrize("name", METHODS)
def test_a_foreign_state_is_refused(name):
    with pytest.raises(ValueError, match=name):
        make(name).load_state_dict({"nothing": np.zeros(3)})


def test_the_state_of_other_ties_is_refused():
    state = make("forgetting", ties="spread").state_dict(single_process)
    with pytest.raises(ValueError, match=r"examples.ties=id"):
        make("forgetting", ties="id").load_state_dict(state)


@pytest.mark.parametrize("name", METHODS)
def test_loading_replaces_all_earlier_observations(name):
    state = make(name).state_dict(single_process)
    method, _ = run(name, range(2))
    method.load_state_dict(state)
    assert same_state(method.state_dict(single_process), state)


def test_the_pool_is_the_end_of_one_permutation_and_random_fixed_starts_like_forgetting():
    order = np.random.default_rng((3, 0, 0)).permutation(N)
    first = make("forgetting").select(0, single_process)
    assert set(range(N)) - set(kept_ids(first, N)) == set(order[N - round(0.2 * N) :])
    assert make("random_fixed").select(0, single_process).facts["hash"] == first.facts["hash"]


def test_the_hash_covers_the_weights():
    method, keep = make("infobatch"), np.ones(N, bool)
    weights = [None, np.full(N, 2, np.float32), np.full(N, 3, np.float32)]
    assert len({method._selection(keep, weight).facts["hash"] for weight in weights}) == 3
