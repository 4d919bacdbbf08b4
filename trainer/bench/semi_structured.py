"""Form `2:4` of `bench inference --forms`: pruned layers as torch's semi-structured tensors, for the sparse tensor cores of NVIDIA GPUs.

Of any four neighbours in a row of the weight at most two are kept, as columns of p x 4 blocks with `keep: 0.5, per: block` leave them.
torch stores these two with 2 bits each for their positions, in bf16, .56 of the dense bytes, and multiplies them through cuSPARSELt.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from sparsity.weights.groups import Block
from sparsity.weights.pruning import Pruning
from trainer.config.errors import ConfigError

CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores
MULTIPLE = 16  # of both sizes of a bf16 weight, torch's rule with cuSPARSELt; its CUTLASS kernels want 32 and 64
SETTINGS = "weights={groups: columns, block: [1, 4], keep: 0.5, per: block}"


class InBf16(nn.Module):
    """A network whose weights are bf16, of float32 images and with float32 logits, outside of autocast."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.to(torch.bfloat16)).float()


def refuse(device: torch.device) -> None:
    """Raises ConfigError for a device without sparse tensor cores that torch uses."""
    here = "a CPU"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if not torch.version.hip and found >= CAPABILITY:
            return
        here = "an AMD GPU" if torch.version.hip else f"one of {found[0]}.{found[1]}"
    raise ConfigError(
        f"--forms 2:4: needs an NVIDIA GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or higher, here is {here}; leave 2:4 out"
    )


def two_of_four(mask: Tensor) -> bool:
    """Whether every four neighbours in a row of a mask (O, I) have two or fewer kept."""
    return mask.shape[1] % 4 == 0 and int(mask.view(len(mask), -1, 4).sum(2).max()) <= 2


def layers(level: Pruning) -> list[Block]:
    """The pruned layers, which torch can store. Raises ValueError for other groups and for sizes that torch refuses."""
    found, masks = [], level.masks()
    for site in level.sites:
        if not isinstance(site, Block) or not two_of_four(masks[site.weight]):
            raise ValueError(f"2:4: {site.name} keeps more than two of four neighbours in a row; train with {SETTINGS}")
        if site.outputs % MULTIPLE or site.inputs % MULTIPLE:
            raise ValueError(
                f"2:4: {site.name} has {site.outputs} x {site.inputs} weights, torch needs multiples of {MULTIPLE}; leave the layer out of "
                "weights.layers"
            )
        found.append(site)
    return found


def semi_structured(
    vit: nn.Module, level: Pruning, device: torch.device, convert: Callable[[Tensor], Tensor] = to_sparse_semi_structured
) -> tuple[nn.Module, int]:
    """A copy of `vit` on the device, in bf16, whose pruned layers are 2:4, and its bytes. convert: a weight (O, I) bf16 on the device to
    its stored form. Raises ValueError as `layers`, and for what torch refuses on this device."""
    sites, network = layers(level), copy.deepcopy(vit).to(device, torch.bfloat16).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    modules: dict[str, Any] = dict(network.named_modules())
    for site in sites:
        weight = modules[site.name].weight.detach().contiguous()
        stored = converted(weight, convert)
        size += stored_bytes(stored) - weight.numel() * weight.element_size()
        modules[site.name].weight = nn.Parameter(stored, requires_grad=False)
    return InBf16(network), size


def converted(weight: Tensor, convert: Callable[[Tensor], Tensor] = to_sparse_semi_structured) -> Tensor:
    """Raises ValueError where torch, or the kernels it came with, refuse this device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its interface a prototype
            return convert(weight)
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"2:4: torch {torch.__version__} refuses a weight of {list(weight.shape)} here: {reason}") from error


def stored_bytes(stored: Tensor) -> int:
    """Of the values and positions of a semi-structured tensor, or of a dense one."""
    parts = [part for name in ("packed", "meta") if (part := getattr(stored, name, None)) is not None] or [stored]
    return sum(part.numel() * part.element_size() for part in parts)
