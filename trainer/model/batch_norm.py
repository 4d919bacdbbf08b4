"""Batch norm over the micro-batches of all processes (`model.sync_batchnorm`), frozen ones, and what a run with batch norms depends on.

torch's SyncBatchNorm computes on GPUs only (torch 2.13 refuses CPU tensors); this one does on any device and backend, from plain
operations, so the law that it is for can be tested on CPUs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from trainer.config.errors import ConfigError
from trainer.config.run_config import Config


def batch_norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def freeze(network: nn.Module) -> None:
    """Keep the batch norms whose weight and bias do not train in evaluation mode, also after `network.train()`: they normalise by their
    running mean and variance and leave them as they are, as fine-tuning of a part of a network expects (timm's freeze)."""
    for norm in batch_norms(network):
        own = list(norm.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            norm.eval()
            norm.train = partial(_stays, norm)


def _stays(norm: nn.Module, mode: bool = True) -> nn.Module:
    return norm


def following(network: nn.Module) -> list[nn.Module]:
    """The batch norms that are not frozen: their running statistics follow the batches."""
    return [norm for norm in batch_norms(network) if "train" not in vars(norm)]


class AllReduce(torch.autograd.Function):
    """The sum over all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed = grads[0].clone()
        dist.all_reduce(summed)
        return summed


class _Synced(nn.modules.batchnorm._BatchNorm):
    """In training on several processes: mean and variance over the batches of all of them, with their gradient. Else torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        return self.after(over_all(self, input))

    def after(self, x: Tensor) -> Tensor:
        return x


class Synced1d(_Synced, nn.BatchNorm1d):
    pass


class Synced2d(_Synced, nn.BatchNorm2d):
    pass


class SyncedAct2d(_Synced, BatchNormAct2d):
    act: nn.Module
    drop: nn.Module

    def after(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


KINDS: dict[type[nn.Module], type[_Synced]] = {
    nn.BatchNorm1d: Synced1d,
    nn.BatchNorm2d: Synced2d,
    BatchNormAct2d: SyncedAct2d,
}


def over_all(norm: Any, x: Tensor) -> Tensor:
    """Batch norm of x (b, C, ...) with the mean and variance of all ranks' x, which may differ in b; updates the running ones."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float()
        others = [dim for dim in range(x.ndim) if dim != 1]
        count = wide.new_tensor([x.numel() / x.shape[1]])
        sums: Any = AllReduce.apply(torch.cat((wide.sum(others), count)))
        number = sums[-1].detach()
        shape = (1, -1, *(1,) * (x.ndim - 2))
        mean = sums[:-1] / number
        centred = wide - mean.view(shape)  # two passes: the difference of two large sums would lose the variance
        summed: Any = AllReduce.apply(centred.square().sum(others))
        variance = summed / number
        if norm.track_running_stats:
            _track(norm, mean.detach(), variance.detach() * number / (number - 1))
        out = centred * (variance + norm.eps).rsqrt().view(shape)
        if norm.affine:
            out = out * norm.weight.float().view(shape) + norm.bias.float().view(shape)
        return out.to(x.dtype)


def _track(norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.num_batches_tracked.add_(1)
    weight = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), weight)


def synchronise(network: nn.Module, config: Config) -> None:
    """Make the batch norms of `network` those above, in place: names, parameters and buffers stay. Raises ConfigError where there are none,
    or of another class."""
    found = batch_norms(network)
    if not found:
        raise ConfigError(f"model.sync_batchnorm=true: model.name={config.model.name} has no batch norm; remove the key")
    if unknown := sorted({type(norm).__name__ for norm in found if type(norm) not in KINDS}):
        raise ConfigError(
            f"model.sync_batchnorm=true: model.name={config.model.name} has {', '.join(unknown)}, which is not supported; set it to false"
        )
    for norm in found:
        norm.__class__ = KINDS[type(norm)]


def is_synchronised(network: nn.Module) -> bool:
    return any(isinstance(m, _Synced) for m in network.modules())


def refuse_precision(network: nn.Module, config: Config) -> None:
    """Raises ConfigError where running statistics would be kept in bf16, which has 8 bits: their small steps would be lost."""
    if config.engine.precision == "bf16" and batch_norms(network):
        raise ConfigError(
            f"engine.precision=bf16: model.name={config.model.name} has batch norms, whose running statistics would be lost in bf16; set "
            "engine.precision=autocast"
        )


def depends_on_world(network: nn.Module, config: Config) -> list[str]:
    """What a run with batch norms depends on beside its configuration, as a sentence with key, value and remedy; [] for nothing."""
    if not (number := len(following(network))):
        return []
    text = f"model.name={config.model.name} has {number} batch norms, so images of a batch change each other's results"
    if config.model.sync_batchnorm:
        return [
            f"{text}: each norm is over the micro-batches of all processes together, data.batch={config.data.batch} images where no "
            "gradients are accumulated; with accumulation results depend on data.micro_batch and the number of processes"
        ]
    text += (
        f": each norm is over the micro-batch of one process (at most data.micro_batch={config.data.micro_batch}), so results depend on "
        "it and on the number of processes; with several processes set model.sync_batchnorm=true to compute it over all of them"
    )
    if config.data.batch > config.data.micro_batch:
        text += f"; where gradients are accumulated (data.batch={config.data.batch}) only a larger data.micro_batch helps"
    return [text]
