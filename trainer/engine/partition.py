"""ZeRO 3 parameters: local parts, full tensors, and copies between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.storage.host_copies import HostCopies


def local_tensors(module: nn.Module) -> dict[str, Tensor]:
    """This rank's part of every parameter and persistent buffer, by name: the module's own tensors; under ZeRO 3 the flat, padded
    partitions of the parameters."""
    values = dict(module.state_dict())
    return values | {name: parameter.ds_tensor for name, parameter in _cut(module)}


def replicated_tensors(module: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of `values`, from `local_tensors`, those that are equal on all ranks: parameters of which every rank has a whole copy, so none under
    ZeRO 3, and the statistics of batch norms. Those of other norms (timm's EvoNorm) follow the images of each rank."""
    whole = {name for name, parameter in module.named_parameters() if not hasattr(parameter, "ds_id")}
    for path, norm in module.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            whole |= {f"{path}.{name}".lstrip(".") for name, _ in norm.named_buffers(recurse=False)}
    return {name: value for name, value in values.items() if name in whole}


def full_tensors(module: nn.Module, values: dict[str, Tensor], copies: HostCopies | None = None) -> dict[str, Tensor]:
    """Tensors from `local_tensors`, unsharded, on the CPU; all ranks but the first get {}. Collective under ZeRO 3. copies: memory for
    them, default new memory."""
    cut, copies, found = dict(_cut(module)), copies or HostCopies(), {}
    first = not dist.is_initialized() or dist.get_rank() == 0
    for name, value in values.items():
        if name in cut:
            value = gathered(cut[name], value)
        if first:
            found[name] = copies(f"average of {name}", value)
    copies.wait()
    return found


def gathered(parameter: Any, part: Tensor) -> Tensor:
    """The full tensor of a partitioned parameter, or of something partitioned like it, from each rank's part; collective."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


@torch.no_grad()
def copy_own_part(module: nn.Module, into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """The reverse of `full_tensors`: each rank copies its own part of the full `values` into `into`, which is from `local_tensors`."""
    cut = dict(_cut(module))
    for name, value in values.items():
        if name in cut:
            size = into[name].numel()
            begin = size * dist.get_rank()
            mine = value.flatten()[begin : begin + size]
            into[name][: mine.numel()].copy_(mine)
        else:
            into[name].copy_(value)


@torch.no_grad()
def load_local(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy tensors from `local_tensors` into the module."""
    drop_gathered([parameter for _, parameter in _cut(module)])
    own = local_tensors(module)
    for name, value in values.items():
        own[name].copy_(value)


def drop_gathered(parameters: list[Any]) -> None:
    """Partition again what ZeRO 3 keeps gathered between steps (small parameters), or the network would keep using those copies."""
    if there := [p for p in parameters if p.data.numel() == p.ds_numel]:
        there[0].partition(param_list=there, has_been_updated=False)


def _cut(module: nn.Module) -> list[tuple[str, Any]]:
    """The parameters that ZeRO 3 partitions over the ranks."""
    return [(name, parameter) for name, parameter in module.named_parameters() if hasattr(parameter, "ds_id")]


def is_pieces(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
