"""Observations of the examples in an epoch, stored on the device until they are gathered from all ranks.

The statistics are the same on every rank: an observation is stored in a slot on the device, and all ranks' slots are
gathered once per epoch and applied on every rank. An epoch presents an example once (its copies in one batch count once), so there
is at most one observation per example between two gathers, and neither rank nor order matters.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsity.types import Gather, Observation


class Observed(NamedTuple):
    """All ranks' observations since the last gather: ids (n,) int64, correct (n,) bool, value (n,) float32 or None."""

    ids: np.ndarray
    correct: np.ndarray
    value: np.ndarray | None


class Observations:
    """One slot per example on the device: 1 byte, and 4 more if a float (`value`) is recorded.

    A slot per example rather than a growing list: its size is known at the start (6.4 MB for ImageNet) and a step costs
    two scatters. Rows that do not count go to one spare slot at the end, so nothing is read back to the host.
    """

    def __init__(self, num_examples: int, value: Literal["spread", "loss"] | None = None):
        self.num_examples, self.value = num_examples, value
        self._code: Tensor | None = None  # (N + 1,) uint8: 0 not observed, 1 wrong, 2 right
        self._number: Tensor | None = None  # (N + 1,) float32

    def allocate(self, device: torch.device) -> None:
        """Make the slots, empty, unless they are there."""
        if self._code is None:
            self._code = torch.zeros(self.num_examples + 1, dtype=torch.uint8, device=device)
            if self.value is not None:
                self._number = torch.zeros(self.num_examples + 1, dtype=torch.float32, device=device)

    @torch.no_grad()
    def record(self, ids: Tensor, observation: Observation) -> None:
        """Store a step's rows, ids (b,) int64; no host sync. A loss counts even if `correct` is unclear."""
        if self._code is None:
            self.allocate(ids.device)
        assert self._code is not None
        counts = (
            observation.valid if observation.clear is None or self.value == "loss" else observation.valid & observation.clear
        )
        slot = torch.where(counts, ids, self.num_examples)
        self._code.index_copy_(0, slot, observation.correct.to(torch.uint8) + 1)
        if self._number is not None:
            self._number.index_copy_(0, slot, getattr(observation, str(self.value)).detach().float())

    def gather(self, gather: Gather) -> Observed:
        """Gather the observations of all ranks and clear them; collective. Integers and floats are gathered separately."""
        if self._code is None:
            ids, code = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
            number = torch.zeros(0, dtype=torch.float32)
        else:
            ids = self._code[:-1].nonzero().flatten()
            code = self._code[ids].long() - 1
            number = self._number[ids] if self._number is not None else None
            self._code.zero_()
        whole = gather(2 * ids + code).cpu().numpy()
        value = gather(number).cpu().numpy() if self.value is not None and number is not None else None
        return Observed(whole >> 1, (whole & 1).astype(bool), value)

    @property
    def state_bytes(self) -> int:
        return sum(t.nbytes for t in (self._code, self._number) if t is not None)

    def clear(self) -> None:
        self._code = self._number = None
