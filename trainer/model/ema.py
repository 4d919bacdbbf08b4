"""The exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from trainer.config.errors import ConfigError
from trainer.engine.partition import copy_own_part, full_tensors, load_local, local_tensors, replicated_tensors
from trainer.storage.host_copies import HostCopies


class Ema:
    """Exponential moving average of the weights in float32, on their device: average <- decay * average + (1 - decay) * weight.

    As timm's ModelEmaV3 with a constant decay: floating point buffers are averaged too, others copied. `decay` None:
    every method does nothing. Names are those of `module`. Under ZeRO 3 each rank averages its own partitions: build it after
    `Engine.prepare`.
    """

    def __init__(self, module: nn.Module, decay: float | None):
        self.decay, self._module = decay, module
        self._averages: dict[str, Tensor] = {}
        self._objects: list[tuple[str, Tensor]] | None = None
        if decay is None:
            return
        for name, value in local_tensors(module).items():
            self._averages[name] = value.detach().clone().float() if value.is_floating_point() else value.detach().clone()

    @torch.no_grad()
    def update(self, taken: bool | Tensor = True) -> None:
        """Call after every optimizer step, with whether it was taken (`Engine.step`); no host sync, no communication."""
        if self.decay is None or taken is False:
            return
        averages, weights = [], []
        for name, value in self._values():
            if value.is_floating_point():
                averages.append(self._averages[name])
                weights.append(value.float())
            elif isinstance(taken, Tensor):
                self._averages[name].copy_(torch.where(taken, value, self._averages[name]))
            else:
                self._averages[name].copy_(value)
        if isinstance(taken, Tensor):  # average + 0 * (weight - average) where the step was left out; weights are always finite
            steps = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(steps, taken * (1.0 - self.decay))
            torch._foreach_add_(averages, steps)
        else:
            torch._foreach_lerp_(averages, weights, weight=1.0 - self.decay)

    def _values(self) -> Iterable[tuple[str, Tensor]]:
        """`local_tensors`, without the 1 ms that a state_dict() costs in every step: the parameters and buffers stay the same objects,
        except under ZeRO 3, whose partitions are looked up."""
        if self._objects is None:
            names = set(self._averages)
            found = [
                *self._module.named_parameters(remove_duplicate=False),
                *self._module.named_buffers(remove_duplicate=False),
            ]
            found = [(name, value) for name, value in found if name in names]
            whole = {name for name, _ in found} == names and not any(hasattr(value, "ds_id") for _, value in found)
            self._objects = found if whole else []
        return self._objects or local_tensors(self._module).items()

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside the context `module` has the averages; afterwards, also after an exception, its own weights again, bit for bit."""
        weights = {name: value.detach().clone() for name, value in local_tensors(module).items()} if self._averages else {}
        try:
            load_local(module, self._averages)
            yield
        finally:
            load_local(module, weights)

    @torch.no_grad()
    def mask(self, masks: Mapping[str, Tensor]) -> None:
        """Set the averages to 0 where a mask, of a parameter's shape, is False; no communication."""
        if self.decay is None:
            return
        own = {name: torch.zeros_like(self._averages[name]) for name in masks}
        copy_own_part(self._module, own, {name: mask.to(own[name].dtype) for name, mask in masks.items()})
        for name, stays in own.items():
            self._averages[name].masked_fill_(stays == 0, 0.0)

    def replicated(self) -> dict[str, Tensor]:
        """The weights and, with a decay, their averages, of which every rank has a whole copy: see `engine.replicas`."""
        weights = replicated_tensors(self._module, local_tensors(self._module))
        averages = replicated_tensors(self._module, self._averages)
        return weights | {f"average of {name}": value for name, value in averages.items()}

    def state_dict(self, copies: HostCopies | None = None) -> dict[str, Tensor]:
        """All averages, unsharded, on the CPU; {} without a decay, and on all ranks but the first. Collective under ZeRO 3. copies: memory
        for them, default new memory."""
        return full_tensors(self._module, self._averages, copies)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ConfigError if the names are not those of this model."""
        wrong = sorted(state.keys() ^ self._averages.keys())
        if wrong:
            raise ConfigError(
                f"the saved average (optim.ema={self.decay}) belongs to another model: different names {', '.join(wrong[:4])} ..."
            )
        copy_own_part(self._module, self._averages, state)
