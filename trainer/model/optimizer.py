"""The optimizer from timm's factory; the learning rate comes from `schedule`.

Parameter groups are timm's: no weight decay on biases, norms and the model's `no_weight_decay`
(pos_embed, cls_token, ...), and with `layer_decay` a smaller rate for earlier blocks. Parameters that `freeze` names are in none.
"""

from __future__ import annotations

import fnmatch
import inspect
from typing import Any, cast

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from trainer.config.errors import ConfigError, did_you_mean
from trainer.config.run_config import ELEMENTWISE
from trainer.config.schema import OptimConfig
from trainer.model import batch_norm

EMBEDDING = ("patch_embed.", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre.")  # in front of the first block


def build_optimizer(model: nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer by name over all parameters of `model` (a SparseNetwork, or a timm model).

    Raises ConfigError for a name unknown to timm, one that cannot be used here, and for trainable parameters outside timm's groups.
    """
    refuse_unknown(settings.name)
    _refuse_unusable(settings)
    network = getattr(model, "network", model)  # it has `no_weight_decay` and the layer groups
    freeze(network, settings.freeze)
    mine = {id(parameter) for parameter in network.parameters()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in mine and parameter.requires_grad]
    if outside:
        raise ConfigError(
            f"{', '.join(outside)}: trainable parameters outside the timm model would not be trained; freeze them or put them in the model"
        )
    fused = settings.fused if settings.fused is not None else torch.cuda.is_available() and has_fused(settings.name)
    more: dict[str, Any] = {"fused": True} if fused else {}
    try:
        return create_optimizer_v2(
            network,
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            filter_bias_and_bn=True,
            layer_decay=settings.layer_decay,
            betas=settings.betas,  # timm drops settings that the optimizer does not have
            eps=settings.eps,
            **more,
        )
    except TypeError as error:
        if "fused" not in str(error):
            raise
        raise ConfigError(
            f"optim.fused=true: {settings.name} has no fused step; use adamw or sgd, or set optim.fused=false"
        ) from error


def freeze(network: nn.Module, what: int | tuple[str, ...]) -> None:
    """Take the gradient from the parameters that `optim.freeze` names: the first blocks with the embedding in front of them, or patterns of
    names; a batch norm without trained parameters stays in evaluation mode. Call it before the engine wraps the network: that decides
    what is reduced, sharded and updated.

    Raises ConfigError for more blocks than the network has, for a pattern that fits no name, and where nothing would train.
    """
    without = frozen(network, what)
    for name, parameter in network.named_parameters():
        if name in without:
            parameter.requires_grad_(False)
    batch_norm.freeze(network)


def frozen(network: nn.Module, what: int | tuple[str, ...]) -> set[str]:
    """The names of the parameters that `optim.freeze` names. Raises ConfigError as `freeze`."""
    names = [name for name, _ in network.named_parameters()]
    if isinstance(what, int):
        found = _first(network, names, what) if what else set()
    else:
        for pattern in what:
            if not fnmatch.filter(names, pattern):
                groups = dict.fromkeys(f"{name.partition('.')[0]}.*" for name in names)
                hint = did_you_mean(pattern, [*names, *groups], number=3) or f"names are those of timm, e.g. {names[0]}"
                raise ConfigError(f"optim.freeze={pattern!r}: no parameter of the network has such a name; {hint}")
        found = {name for pattern in what for name in fnmatch.filter(names, pattern)}
    if len(found) == len(names):
        raise ConfigError(f"optim.freeze={what}: nothing would train; freeze less, e.g. not the head")
    return found


def _first(network: nn.Module, names: list[str], number: int) -> set[str]:
    """The parameters of the first `number` blocks and of what is in front of them. Blocks are those of a transformer, or timm's layer
    groups, which `layer_decay` counts too."""
    if any(name.startswith("patch_embed.") for name in names) and any(name.startswith("blocks.") for name in names):
        depth = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
        first = (*EMBEDDING, *(f"blocks.{one}." for one in range(number)))
        found = {name for name in names if name.startswith(first)}
    else:
        groups = _groups(network)
        depth = len(groups) - 2  # the first one is the stem, the last one norm and head
        found = {name for group in groups[: number + 1] for name in group}
    if number > depth:
        raise ConfigError(f"optim.freeze={number}: this network has {depth} blocks; freeze at most {depth}")
    return found


def _groups(network: nn.Module) -> list[list[str]]:
    """timm's layer groups in order. Raises ConfigError for a network without them."""
    if not hasattr(network, "group_matcher"):
        raise ConfigError(
            f"optim.freeze: timm has no layer groups for a {type(network).__name__}; name parameters in place of a number of blocks, e.g. "
            'optim.freeze=["stem.*"]'
        )
    groups = group_parameters(network, cast(Any, network).group_matcher(coarse=False))
    return [groups[number] for number in sorted(groups)]


def has_betas(name: str) -> bool:
    """Whether timm's optimizer of this name takes `optim.betas`; True for one unknown to timm, which is refused elsewhere."""
    try:
        return get_optimizer_info(_base(name)).has_betas
    except ValueError:
        return True


def has_fused(name: str) -> bool:
    """Whether timm's optimizer of this name can step in one kernel; its wrappers (`lookahead_...`) too. False for one unknown to timm."""
    try:
        kind = get_optimizer_class(_base(name), bind_defaults=False)
    except ValueError:
        return False
    return "fused" in inspect.signature(kind).parameters


def has_setting(name: str, setting: str) -> bool:
    """Whether timm's optimizer of this name takes a setting, e.g. `eps`. True for one unknown to timm, which is refused elsewhere."""
    try:
        kind = get_optimizer_class(_base(name), bind_defaults=False)
    except ValueError:
        return True
    return setting in inspect.signature(kind).parameters


def _base(name: str) -> str:
    """`lookahead_adamw` -> `adamw`."""
    return name.lower().split("_")[-1]


def _refuse_unusable(settings: OptimConfig) -> None:
    """One step of two small parameters. Raises ConfigError for an optimizer that fails in it (another form of step, or a library or
    device that is not here), and for one whose state a checkpoint cannot hold. The usual ones are not tried."""
    if _base(settings.name) in ELEMENTWISE:
        return
    name, on_gpu = settings.name, settings.name.lower().startswith(("fused", "bnb")) and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    parameters = [nn.Parameter(torch.ones(shape, device=device)) for shape in ((4, 4), (4,))]
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer = create_optimizer_v2(parameters, opt=name, lr=settings.lr, betas=settings.betas, eps=settings.eps)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    except Exception as error:
        raise ConfigError(
            f"optim.name={name}: cannot be used here, a step fails with {type(error).__name__}: {error}; choose another, e.g. adamw"
        ) from error
    states = getattr(optimizer, "_base_optimizer", optimizer).state.values()
    wrong = sorted(
        {key for state in states for key, value in state.items() if not isinstance(value, Tensor | bool | int | float)}
    )
    if wrong:
        raise ConfigError(
            f"optim.name={name}: a checkpoint holds tensors and numbers, its state ({', '.join(wrong)}) has others; choose another, e.g. "
            "adamw"
        )


def refuse_unknown(name: str) -> None:
    """Raise ConfigError, with similar names, for an optimizer unknown to timm."""
    try:
        get_optimizer_info(_base(name))
    except ValueError:
        known = [str(known) for known in list_optimizers()]
        hint = did_you_mean(name.lower(), known, number=3) or "timm.optim.list_optimizers() lists them"
        raise ConfigError(f"optim.name={name!r}: unknown optimizer of timm; {hint}") from None
