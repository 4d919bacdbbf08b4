"""The hash chain of a run's training data: (example, copy, augmentation) of every global batch, for any number of processes.

A batch's digest is the sum modulo 2^64 of one 64-bit hash per row, so ranks can be added in any order; the chain folds the
digests in step order with BLAKE2b. It detects differences between two runs; it is not safe against deliberate forgery of rows.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from trainer.engine.engine import Engine

NEWEST = 8  # digests that are remembered
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def digest(ids: np.ndarray, rng_keys: np.ndarray, weights: np.ndarray) -> int:
    """Sum of row hashes of one rank's slice, as a signed 64-bit number; rows of weight 0 (padding, broken images) don't count."""
    with np.errstate(over="ignore"):
        x = (ids.astype(np.uint64) + np.uint64(1)) * GOLDEN ^ rng_keys.astype(np.int64).view(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31)))[weights > 0]
        return int(x.sum(dtype=np.uint64).astype(np.int64))


def extend(head: str, value: np.int64 | int) -> str:
    """The head after one more global batch, `value` its digest (signed 64 bit)."""
    return hashlib.blake2b(bytes.fromhex(head) + np.int64(value).astype("<i8").tobytes(), digest_size=16).hexdigest()


class HashChain:
    """The chain so far and the digests of this rank that are not in it yet."""

    def __init__(self, head: str = ""):
        self.head = head
        self._newest: deque[int] = deque(maxlen=NEWEST)  # digests of the newest batches in the chain, over all ranks
        self._pending: list[int] = []

    def add(self, ids: torch.Tensor, rng_keys: torch.Tensor, weights: torch.Tensor) -> None:
        """One global batch; the tensors are this rank's slice, on the CPU."""
        self._pending.append(digest(ids.numpy(), rng_keys.numpy(), weights.numpy()))

    def close(self, engine: Engine) -> str:
        """Fold all pending batches in; collective, the same head on all ranks."""
        if self._pending:
            total = engine.all_reduce_sum(torch.tensor(self._pending, dtype=torch.int64).to(engine.device)).cpu().numpy()
            for value in total:
                self.head = extend(self.head, value)
            self._newest.extend(int(value) for value in total)
            self._pending.clear()
        return self.head

    def digest_before(self, batches: int = 0) -> str:
        """The digest of the newest batch in the chain, or of the one that came `batches` (< NEWEST) before it."""
        return f"{self._newest[-1 - batches] & (1 << 64) - 1:016x}"
