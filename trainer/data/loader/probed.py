"""Which examples are probed after an epoch (`examples.rule: probe`): a pure function of seed, epoch and id, equal on all ranks."""

from __future__ import annotations

import numpy as np

from trainer.data.keyed_hash import permutation

GROUPS = 1024  # runs of neighbouring ids that are probed together: an epoch's probe then reads few shards
SALT = 0x70726F6265  # separates this order from other permutations of the seed


def probed(keep: np.ndarray, num_examples: int, seed: int, epoch: int, share: float) -> np.ndarray:
    """The kept examples that are probed after `epoch`, rising, (n,) int64. keep: packed bits of the selection.

    Groups of neighbouring ids take turns in one keyed permutation: each is probed once in 1 / `share` epochs, so in a window all
    have the same number of probes (up to one where window x share is not a whole number).
    """
    groups = min(num_examples, GROUPS)
    turn = np.empty(groups, dtype=np.int64)
    turn[permutation(groups, seed, SALT)] = np.arange(groups)
    first, last = (round(at * share * groups) for at in (epoch, epoch + 1))
    due = (turn - first) % groups < last - first
    ids = np.flatnonzero(np.unpackbits(keep, count=num_examples, bitorder="little"))
    return ids[due[ids * groups // num_examples]]


def most_probed(num_examples: int, share: float) -> int:
    """An upper bound of the number of examples that are probed after one epoch."""
    groups = min(num_examples, GROUPS)
    return min(num_examples, (int(share * groups) + 1) * -(-num_examples // groups))
