"""Level 1: which examples an epoch shows, by method name. A new method is one file and one row in `EXAMPLES`.

In: what a training step observed (ids, correctness, loss).
Out: a `Selection` per epoch, equal on all ranks.
Never: reads data or knows ranks.
"""

from __future__ import annotations

import numpy as np

from sparsity.examples.curriculum import Curriculum
from sparsity.examples.forgetting import Forgetting
from sparsity.examples.infobatch import InfoBatch
from sparsity.examples.random_subset import RandomEpoch, RandomFixed
from sparsity.types import Selection


class All(Curriculum):
    """The identity: every example in every epoch."""

    name = "all"

    def _start(self) -> None:
        if self.removed:
            raise ValueError(
                f"examples.removed={self.removed} with examples.method=all: 'all' removes nothing; choose examples.method="
                f"{'|'.join(name for name in EXAMPLES if name != 'all')}, or set examples.removed=0"
            )

    def _select(self, epoch: int) -> Selection:
        return self._everything()


EXAMPLES: dict[str, type[Curriculum]] = {
    "all": All,
    "forgetting": Forgetting,
    "infobatch": InfoBatch,
    "random_fixed": RandomFixed,
    "random_epoch": RandomEpoch,
}


def kept_ids(selection: Selection, num_examples: int) -> np.ndarray:
    """The ids an epoch shows, rising, (num_kept,) int64: the list to export."""
    return np.flatnonzero(np.unpackbits(selection.keep, count=num_examples, bitorder="little"))
