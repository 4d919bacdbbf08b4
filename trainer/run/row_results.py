"""What a step makes of the network's output: the loss that is differentiated, the observations of the examples, the sums of the meters.

Where the network is compiled this is one graph for the whole run, forward and backward; eager it is about 90 operations on a few numbers
per row, each of which costs a launch. The code is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsity.types import Examples, ModelOutput
from trainer.data.augment.mixup import Mix, flags_of
from trainer.data.batch import Batch
from trainer.model.distillation import Distillation
from trainer.model.objective import Flags, Objective, spread_of
from trainer.telemetry.meters import Meters


class RowResults:
    """examples: that observe, or None. scaled: see `Engine.scaled`. compiled: as one graph, for micro-batches on `device`."""

    def __init__(
        self, objective: Objective, distillation: Distillation, examples: Examples | None, meters: Meters,
        scaled: Callable[[Tensor], Tensor], *, compiled: bool, device: torch.device,
    ) -> None:  # fmt: skip
        self._objective, self._distillation, self._examples, self._meters = objective, distillation, examples, meters
        self._scaled = scaled
        self._graph = None
        if compiled:
            if examples is not None:
                examples.allocate(device)  # a graph that did it would be made again for the second step
            self._graph = torch.compile(self._whole, dynamic=False, fullgraph=True)

    def __call__(
        self, part: Batch, mix: Mix, output: ModelOutput, targets: Tensor, taught: ModelOutput | None, total: Tensor
    ) -> Tensor:
        """The loss for `Engine.backward(..., scaled=True)`, 0-dim; observations and sums are stored. targets: (b, C) of `part`; taught:
        the teacher's output; total: weights of all examples of the global batch."""
        spread = spread_of(output)  # outside: the attention has another width under each plan, and one graph serves all of them
        if self._graph is None or mix.numbers is None:
            return self._whole(part, mix.flags, output, targets, taught, total, spread)
        return self._graph(part, mix.numbers, output, targets, taught, total, spread)

    def _whole(
        self, part: Batch, mixed: Flags | Tensor, output: ModelOutput, targets: Tensor, taught: ModelOutput | None, total: Tensor,
        spread: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """mixed: `Mix.flags`, or `Mix.numbers` of the device."""
        flags = flags_of(mixed) if isinstance(mixed, Tensor) else mixed
        losses, parts = self._distillation(self._objective.losses(output.logits, targets), output, taught)
        credited, observation = self._objective.credited(part, output.logits, losses, flags, spread)
        if self._examples is not None:
            self._examples.observe(credited, observation)
        self._meters.add(losses, part.weights, observation, parts)
        return self._scaled((losses * part.weights).sum() / total.clamp(min=1e-12))
