"""From a micro-batch on the device to mixed images and their targets, as one graph of torch.compile for the whole run.

The graph computes what `on_device` and `mixup` compute. What changes from step to step, the share and the box of the mix, reaches it as
numbers on the device, so it is compiled once; tables that are looked up are its inputs. Eager, these are 60 kernels that move the images
several times; compiled, the images are read and written once.

Letters: b rows of a micro-batch, S side of an image, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trainer.config.schema import AugmentConfig
from trainer.data.augment import on_device
from trainer.data.augment.mixup import Mix, mix_images, mix_targets, numbers, partners
from trainer.data.augment.on_device import augment_on_device
from trainer.data.augment.policy_on_device import Codes, apply_policy, codes_of
from trainer.data.batch import Batch

Prepare = Callable[[Batch, Mix], tuple[Tensor, Tensor]]
"""(micro-batch on the device, mix of the step) -> images (b, 3, S, S) float32, targets (b, C) float32."""


def build_prepare(augment: AugmentConfig, classes: int, *, compiled: bool) -> Prepare:
    """compiled: as one graph, which takes `Mix.numbers`; else by `on_device` and `mixup`."""
    if not compiled:
        return partial(_eager, augment, classes)
    graph = torch.compile(partial(whole, augment, classes, codes_of(augment)), dynamic=False, fullgraph=True)

    def prepare(batch: Batch, mix: Mix) -> tuple[Tensor, Tensor]:
        mixed = numbers(mix).to(batch.images.device) if mix.numbers is None else mix.numbers
        return graph(*inputs(batch, augment, mixed))

    return prepare


def _eager(augment: AugmentConfig, classes: int, batch: Batch, mix: Mix) -> tuple[Tensor, Tensor]:
    images = mix_images(augment_on_device(batch, augment), mix, batch.weights)
    return images, mix_targets(batch.labels, mix, batch.weights, classes, augment.smoothing)


def inputs(batch: Batch, augment: AugmentConfig, mixed: Tensor) -> tuple[Tensor, ...]:
    """What `whole` takes: fields of the batch, the numbers of the mix, and the tables of the augmentation."""
    device = batch.images.device
    mean, std = on_device.statistics(augment, device)
    table = on_device.noise_table(batch.images.shape[1:].numel(), device)
    fields = (batch.images, batch.labels, batch.weights, batch.policy, batch.flip, batch.erase, batch.rng_keys)
    return *fields, mixed, mean, std, table


def whole(
    augment: AugmentConfig, classes: int, codes: Codes, images: Tensor, labels: Tensor, weights: Tensor, policy: Tensor, flip: Tensor,
    boxes: Tensor, rng_keys: Tensor, mixed: Tensor, mean: Tensor, std: Tensor, table: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Images (b, 3, S, S) and targets (b, C), both float32; see `inputs`. codes: of the policy."""
    images = apply_policy(images, policy, codes, augment)
    if augment.flip > 0:
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    images = images.contiguous().float().sub(mean).div(std)
    if augment.erasing > 0:
        images = on_device.erase(images, boxes, rng_keys, table)
    off = augment.smoothing / classes
    hard = torch.where(
        torch.arange(classes, device=labels.device) == labels.clamp(min=0)[:, None], 1.0 - augment.smoothing + off, off
    )
    if not (augment.mixup > 0 or augment.cutmix > 0):
        return images, hard
    lam, top, bottom, left, right = mixed[:5].unbind()
    there = partners(weights) > 0
    own, other = torch.where(there, lam, 1.0), torch.where(there, 1.0 - lam, 0.0)
    targets = hard * own[:, None] + partners(hard) * other[:, None]
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    pasted = torch.where(there[:, None, None, None] & inside, partners(images), images)
    blended = images * own[:, None, None, None] + partners(images) * other[:, None, None, None]
    return torch.where(bottom > top, pasted, blended), targets
