"""The rule `probe` of forgetting: an example is right if the network classifies its clean, unmixed image correctly.

After each epoch a share of the kept examples is evaluated without gradient under the evaluation transform. The examples take
turns in a keyed order, so each is probed equally often in a window. Ours: the paper and its code count what the augmented and
mixed training images give. See docs/methods.md, section Examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sparsity.settings import ByRun, Keep, RunLength, Settings, setting
from sparsity.types import Plan


def _share(run: RunLength, given: Mapping[str, float]) -> float:
    """Three observations in a window, which a score requires."""
    window = given.get("window") or 30.0
    return min(1.0, max(math.ceil(3e4 / window - 1e-6) / 1e4, 1e-4))


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """Cost: a forward pass of `probe_share` of the kept examples per epoch, about a third of that share of a dense epoch."""

    section: ClassVar[str] = "examples"
    probe_share: Keep = setting(
        0.1,
        "share of the kept examples that is probed after each epoch; window x share must be >= 3",
        ByRun("3 / window", _share),
    )
    probe_keep: Keep = setting(1.0, "keep ratio of tokens in the probe's forward pass; 1 = dense")

    @property
    def plan(self) -> Plan:
        """The keep ratios of the probe's forward pass."""
        return Plan(keep_tokens=self.probe_keep)
