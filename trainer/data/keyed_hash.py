"""Random numbers as pure functions of integer keys: a counter hash, not numpy's generators, whose streams may change between
releases. Equal on every machine and in every release: replay rebuilds the order of old runs from them."""

from __future__ import annotations

import numpy as np


def hashed(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 hash of integers (splitmix64 over each part in turn); arrays broadcast. Equal on every machine."""
    with np.errstate(over="ignore"):
        state = np.uint64(0x6A09E667F3BCC909)
        for part in parts:
            word = np.asarray(part).astype(np.uint64)
            z = (np.asarray(state) ^ word) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return np.asarray(state)


def permutation(n: int, *about: int) -> np.ndarray:
    """(n,) int64 permutation of 0 .. n - 1, a pure function of the integers `about`."""
    return np.argsort(hashed(*about, np.arange(n)), kind="stable")


def row_keys(seed: int, epoch: int, ids: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """(b,) int64 key of every row, for all its random choices on host and device."""
    return hashed(seed, epoch, ids, copies).view(np.int64)
