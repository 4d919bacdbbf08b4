"""Which examples are probed, and their images: keyed by seed, epoch and id alone, each equally often, the same on any world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.images import config, write_shards
from trainer.data.loader.build import clean_images, validation_set
from trainer.data.loader.probed import GROUPS, most_probed, probed
from trainer.data.shards.index import Index, build_index

SIZES = [11, 1, 20, 8, 10]  # 50 images


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(write_shards(tmp_path_factory.mktemp("shards"), SIZES, broken=[7]), progress=False)


def bits(n: int, without: list[int] | None = None) -> np.ndarray:
    keep = np.ones(n, dtype=bool)
    keep[without or []] = False
    return np.packbits(keep, bitorder="little")


@given(st.integers(1, 3000), st.floats(0.01, 1.0), st.integers(0, 9), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_each_example_is_probed_equally_often(n: int, share: float, seed: int, begin: int) -> None:
    """From any epoch on, window x share times, up to one; never more at once than the rows that are set aside."""
    window, counts = 7, np.zeros(n, dtype=int)
    for epoch in range(begin, begin + window):
        ids = probed(bits(n), n, seed, epoch, share)
        assert np.array_equal(ids, np.unique(ids)) and len(ids) <= most_probed(n, share)
        counts[ids] += 1
    groups = min(n, GROUPS)
    turns = [round(at * share * groups) for at in (begin, begin + window)]
    assert counts.min() >= (turns[1] - turns[0]) // groups and counts.max() <= -(-(turns[1] - turns[0]) // groups)


def test_ten_epochs_of_a_tenth_probe_each_once() -> None:
    """Also of an ImageNet, where 1,024 groups of neighbours take turns, so that a probe reads a tenth of the shards or a few more."""
    n = 1_281_167
    found = [probed(bits(n), n, 0, epoch, 0.1) for epoch in range(30, 40)]
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(n))
    assert all(0.098 * n < len(ids) < 0.102 * n for ids in found)
    assert len(np.unique(found[0] // 1251)) < 230  # of 1,025 shards of 1,251 images
    assert not np.array_equal(found[0], probed(bits(n), n, 1, 30, 0.1)), "another seed, another order"


def test_the_order_never_changes_and_left_out_examples_are_not_probed() -> None:
    """A run that resumes with a later version probes the same: stored ids."""
    assert probed(bits(40), 40, 3, 2, 0.25).tolist() == STORED
    without = STORED[:4]
    assert probed(bits(40, without), 40, 3, 2, 0.25).tolist() == STORED[4:]


STORED = [1, 2, 6, 12, 17, 21, 23, 30, 36, 39]


@pytest.mark.parametrize(("world", "batch", "workers"), [(1, 8, 0), (2, 8, 1), (3, 7, 0), (5, 100, 0), (64, 2, 0)])
def test_every_chosen_image_once_in_equal_batches_on_any_world(index: Index, world: int, batch: int, workers: int) -> None:
    """Ranks make the same number of passes over the same number of rows (ZeRO 3, torch.compile), also in epochs with fewer ids."""
    settings = config("x", evaluate={"batch": batch}, data={"workers": workers})
    pixels = {int(i): row for b in validation_set(index, settings, 0, 1) for i, row in zip(b.ids, b.images, strict=True)}
    for ids in (np.arange(50), np.arange(3, 50, 4), np.array([7, 8]), np.array([], dtype=np.int64)):
        parts = [list(clean_images(index, settings, rank, world, 1.0).of(ids)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert {len(b.ids) for part in parts for b in part} <= {min(batch, -(-50 // world))}
        rows = [
            (int(i), float(w), row)
            for part in parts
            for b in part
            for i, w, row in zip(b.ids, b.weights, b.images, strict=True)
        ]
        there = [(i, w) for i, w, _ in rows if i >= 0]
        assert there == [(i, float(i != 7)) for i in ids.tolist()], "each once, the broken one with weight 0"
        assert all(torch.equal(row, pixels[i]) for i, _, row in rows if i >= 0)
        assert all(w == 0 for i, w, _ in rows if i < 0)


def test_remote_shards_are_asked_for_in_the_order_of_need(index: Index, tmp_path: Path) -> None:
    """Through a cache, the shards of the chosen ids and no others are fetched ahead."""
    settings = config("x", evaluate={"batch": 4}, data={"cache": str(tmp_path / "cache"), "cache_size": 1.0})
    clean, asked = clean_images(index, settings, 0, 1, 1.0), []
    assert clean._ahead is not None
    clean._ahead.request = lambda shards: asked.append(list(shards))  # pyright: ignore[reportAttributeAccessIssue]
    ids = np.array([0, 1, 2, 3, 35, 36, 37, 45])
    assert torch.cat([b.ids for b in clean.of(ids)]).tolist() == ids.tolist()
    assert [shards for shards in asked if shards] == [[0, 3, 4], [3, 4]]
