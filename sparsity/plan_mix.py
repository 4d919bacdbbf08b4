"""The plans that the steps of a stretch of training draw from, keyed by (seed, step), so that all ranks and a resume draw the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsity import keyed_random
from sparsity.types import Plan

SALT = 0x706C616E  # salt of the draw


@dataclass(frozen=True)
class PlanMix:
    """parts: ((share of the steps, plan), ...); the shares sum to 1. A single part: nothing is drawn."""

    parts: tuple[tuple[float, Plan], ...]

    @classmethod
    def of(cls, plan: Plan) -> PlanMix:
        """One plan for every step."""
        return cls(((1.0, plan),))

    def draw(self, seed: int, step: int) -> Plan:
        """The plan of step number `step`."""
        (_, chosen), *others = self.parts
        if others:
            left = float(keyed_random.uniform(torch.tensor(seed), SALT, step))
            for share, plan in self.parts:
                if left < 0.0:
                    break
                left, chosen = left - share, plan
        return chosen

    def mean(self, value: Callable[[Plan], float]) -> float:
        """Expectation over the steps of a value of their plans; of a single plan its value, unchanged."""
        if len(self.parts) == 1:
            return value(self.parts[0][1])
        return sum(share * value(plan) for share, plan in self.parts)

    @property
    def keep_tokens(self) -> float:
        """Mean keep ratio of tokens over the steps."""
        return self.mean(lambda plan: plan.keep_tokens)

    @property
    def keep_connections(self) -> float:
        """Mean keep ratio of connections over the steps."""
        return self.mean(lambda plan: plan.keep_connections)
