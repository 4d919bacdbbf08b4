"""Level 4 in a run: the loop calls `begin_epoch` between two epochs and `after_step` behind every optimizer step that was taken.

The level itself (`sparsity.weights`) sees whole parameters; here they are read and changed where DDP or ZeRO stores them. When groups
are pruned, their weights, moments and averages become 0, and from then on their gradients are: nothing moves them, and the gradient
norm is that of what is trained. Without a method nothing happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from sparsity.network import SparseNetwork
from sparsity.weights.pruning import Pruning
from trainer.checkpoint.state import TrainState
from trainer.config.errors import ConfigError
from trainer.engine.engine import Engine
from trainer.model.build import refuse_frozen
from trainer.model.ema import Ema
from trainer.model.pruning_figures import facts
from trainer.run.recorder import Recorder


class WeightPruning:
    """level: of the configuration. model: after `Engine.prepare`. saved: the level's state in a checkpoint, {} without one.

    Raises ConfigError for layers that are frozen, and for the state of other layers or groups."""

    def __init__(
        self, level: Pruning, engine: Engine, model: SparseNetwork, ema: Ema, recorder: Recorder, saved: Mapping[str, Tensor]
    ):
        self.level, self._engine, self._model, self._ema, self._recorder = level, engine, model, ema, recorder
        refuse_frozen(level, model)
        try:
            level.load_state_dict(saved, engine.device)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._mask_gradients()

    def begin_epoch(self, state: TrainState) -> None:
        """At the start of an epoch, before its first step; collective. Once per epoch: a resume in mid-epoch does not call it."""
        if not self.level.parameters:
            return
        names, found = self.level.parameters, self._engine.state
        event = self.level.begin_epoch(state.epoch, lambda: found.whole(names))
        if event == "pruned":
            self._remove()
        weights = found.whole(names)
        if self._engine.is_main:
            self._recorder.pruned(state, facts(self.level, weights, self._model) | {"event": event})

    def after_step(self, lr: float, taken: bool | Tensor = True) -> None:
        """The penalty's part of a step, if it was `taken` (`Engine.step`); no communication and no host sync."""
        if self.level.moves and taken is not False:

            def pull(name: str, values: Tensor, begin: int) -> Tensor:
                pulled = self.level.pulled(name, values, begin, lr)
                return torch.where(taken, pulled, values) if isinstance(taken, Tensor) else pulled

            self._engine.state.change(self.level.parameters, pull)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint; on all ranks the same."""
        return self.level.state_dict()

    def _remove(self) -> None:
        """Weights, moments and averages of the groups that are pruned become 0."""
        masks = self.level.masks()
        flat = {name: mask.flatten() for name, mask in masks.items()}

        def masked(name: str, values: Tensor, begin: int) -> Tensor:
            stays = flat[name][begin : begin + len(values)].to(values.device)
            return values.masked_fill(~stays, 0.0)

        self._engine.state.change(masks, masked)
        self._engine.state.change(masks, masked, moments=True)
        self._ema.mask(masks)
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        """From now on the gradients of pruned groups are 0; a NaN there stays, so that the step is still skipped."""
        masks = self.level.masks()
        for name, parameter in self._model.network.named_parameters():
            if name in masks:
                parameter.register_hook(partial(torch.mul, masks[name]))
