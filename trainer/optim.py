"""Optimizer, learning rate and weight average, as timm makes them.

The optimizer comes from timm's factory with timm's groups: no weight decay on biases, norms and what the model itself names
(pos_embed, cls_token, ...), and with `layer_decay` a smaller rate for earlier blocks. The learning rate is a pure function of
progress (epochs, fractional), equal to timm's CosineLRScheduler stepped per update; so neither a resume nor shorter epochs
nor another world size can shift it.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from trainer.config import Config
from trainer.engine_state import fill, gathered, held, take
from trainer.sections import Optim
from trainer.values import ConfigError


def build_optimizer(model: nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """timm's optimizer by name over all parameters of `model` (a SparseViT, or a timm model).

    Raises ConfigError on a name timm doesn't know, and where a parameter would be left untrained in silence.
    """
    refuse_unknown(settings.name)
    network = getattr(model, "vit", model)  # the one that knows its `no_weight_decay` and its layers
    mine = {id(parameter) for parameter in network.parameters()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in mine and parameter.requires_grad]
    if outside:
        raise ConfigError(f"{', '.join(outside)}: trainable parameters outside the timm model, no group is defined for them")
    more: dict[str, Any] = {"fused": True} if settings.fused else {}
    try:
        return create_optimizer_v2(
            network,
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            filter_bias_and_bn=True,
            layer_decay=settings.layer_decay,
            betas=settings.betas,  # timm takes out what this optimizer has no use for
            eps=settings.eps,
            **more,
        )
    except TypeError as error:
        if "fused" not in str(error):
            raise
        raise ConfigError(f"optim.fused=true: {settings.name} has no fused step; use adamw or sgd, or fused=false") from error


def refuse_unknown(name: str) -> None:
    """Raise ConfigError where timm has no such optimizer, with the names that are near."""
    try:
        get_optimizer_info(name.lower().split("_")[-1])
    except ValueError:
        known = [str(known) for known in list_optimizers()]
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.optim.list_optimizers() lists them"
        raise ConfigError(f"optim.name={name!r}: timm has no such optimizer; {hint}") from None


def learning_rate(progress: float, config: Config) -> float:
    """The learning rate at `progress` = epoch + batch / batches in this epoch.

    Linear from `warmup_lr`, then the cosine over *all* epochs (timm's warmup_prefix=False: the warm-up covers its beginning).
    """
    o = config.optim
    if progress < o.warmup:
        return o.warmup_lr + progress * (o.lr - o.warmup_lr) / o.warmup
    if progress >= config.epochs:
        return o.min_lr
    return o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + math.cos(math.pi * progress / config.epochs))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its rate: `lr` times the group's `lr_scale` (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Ema:
    """Exponential moving average of the weights in float32, on their device: average <- decay * average + (1 - decay) * weight.

    As timm's ModelEmaV3 with a constant decay: floating point buffers are averaged too, others copied. `decay` None: nothing is
    kept and every method does nothing. Names are those of `module`. Under ZeRO 3 each rank averages its own pieces: build it after
    `Engine.prepare`.
    """

    def __init__(self, module: nn.Module, decay: float | None):
        self.decay, self._module = decay, module
        self._averages: dict[str, Tensor] = {}
        if decay is None:
            return
        for name, value in held(module).items():
            self._averages[name] = value.detach().clone().float() if value.is_floating_point() else value.detach().clone()

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """After every optimizer step; no host sync, nothing is sent."""
        if self.decay is None:
            return
        averages, weights = [], []
        for name, value in held(module).items():
            if value.is_floating_point():
                averages.append(self._averages[name])
                weights.append(value.float())
            else:
                self._averages[name].copy_(value)
        torch._foreach_lerp_(averages, weights, weight=1.0 - self.decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside the block `module` holds the averages; after it, whatever happens, the weights it had before, to the bit."""
        weights = {name: value.detach().clone() for name, value in held(module).items()} if self._averages else {}
        try:
            fill(module, self._averages)
            yield
        finally:
            fill(module, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Every average whole on the CPU, {} without a decay; under ZeRO 3 collective, and {} on all ranks but the first."""
        return gathered(self._module, self._averages)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ConfigError where the names are not those of this model."""
        wrong = sorted(state.keys() ^ self._averages.keys())
        if wrong:
            raise ConfigError(f"the saved average (optim.ema={self.decay}) is of another model: {', '.join(wrong[:4])} ...")
        take(self._module, self._averages, state)
