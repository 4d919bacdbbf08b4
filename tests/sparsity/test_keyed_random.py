"""Random numbers keyed by what they are about: the reference hash, evenness, independence of batch and salt."""

import math

import pytest
import torch

from sparsity import keyed_random

KEYS = torch.tensor([0, 1, -1, 2**62, -(2**63), 12345678901])
WORD = (1 << 64) - 1
STORED = [14718784, 4049177, 10963046]
STORED_TABLE = [8563767, 244170, 8294734, 623819]


def splitmix(word: int) -> int:
    """The finaliser in Python's unbounded integers."""
    word &= WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


def test_the_hash_is_splitmix_in_wrapping_int64():
    assert [w & WORD for w in keyed_random._mixed(KEYS).tolist()] == [splitmix(k) for k in KEYS.tolist()]


def test_these_numbers_never_change():
    """Runs are replayed by them: a changed hash is another run."""
    assert (keyed_random.uniform(torch.tensor([0, 1, 2]), 3, 4) * 2**24).long().tolist() == STORED
    assert (keyed_random.uniform(torch.tensor([7]), 3, shape=(2, 2)) * 2**24).long().flatten().tolist() == STORED_TABLE


def test_uniform_is_even_and_independent():
    numbers = keyed_random.uniform(torch.arange(2000), 5, shape=(50,))
    assert numbers.shape == (2000, 50) and numbers.dtype == torch.float32
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert ((counts - 5000).abs() < 5 * math.sqrt(5000)).all()
    others = (keyed_random.uniform(torch.arange(2000), 6, shape=(50,)), numbers.roll(1, 0), numbers.roll(1, 1))
    for other in others:  # another salt, the neighbour's key, the next place
        both = torch.stack((numbers.flatten(), other.flatten()))
        assert torch.corrcoef(both)[0, 1].abs() < 0.015


def test_normal_has_its_moments():
    numbers = keyed_random.normal(torch.arange(1000), 1, shape=(10, 10))
    assert numbers.shape == (1000, 10, 10) and numbers.isfinite().all()
    assert abs(numbers.mean()) < 0.02 and abs(numbers.var() - 1) < 0.02 and abs((numbers**4).mean() - 3) < 0.15


def test_a_number_depends_on_its_key_alone():
    keys = torch.arange(100)
    whole = keyed_random.uniform(keys, 1, shape=(3,))
    assert torch.equal(whole[40:50], keyed_random.uniform(keys[40:50], 1, shape=(3,)))
    assert torch.equal(keyed_random.uniform(keys.view(10, 10), 2), keyed_random.uniform(keys, 2).view(10, 10))
    assert keyed_random.uniform(keys, 1, 2).ne(keyed_random.uniform(keys, 2, 1)).all()
    pairs = keyed_random.combine(keys[:, None], keys)
    assert pairs.shape == (100, 100) and pairs.unique().numel() == 10_000


@pytest.mark.gpu
def test_a_gpu_draws_the_same():
    keys = torch.arange(1000)
    assert torch.equal(keyed_random.uniform(keys, 1, shape=(7,)), keyed_random.uniform(keys.cuda(), 1, shape=(7,)).cpu())
