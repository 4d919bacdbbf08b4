"""Optimizer and weight average, as timm makes them; the learning rate of a moment is `schedule`'s.

The optimizer comes from timm's factory with timm's groups: no weight decay on biases, norms and what the model itself names
(pos_embed, cls_token, ...), and with `layer_decay` a smaller rate for earlier blocks.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from trainer.config.errors import ConfigError
from trainer.config.schema import OptimConfig


def build_optimizer(model: nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
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
