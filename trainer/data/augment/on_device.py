"""The device's part of the augmentation: with `augment.policy_on: device` the policy, then flip, normalise, erase. The host draws the
parameters, keyed by the example.

In timm's order and with timm's numbers: flip, then `PrefetchLoader`'s normalisation of 0..255, then random erasing with normal
noise per pixel (Zhong et al. 2017, timm's "pixel" mode). No host sync.

Letters: b rows of a micro-batch, S side of an image.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsity import keyed_random
from trainer.config.schema import AugmentConfig
from trainer.data.augment.policy_on_device import apply_policy, codes_of

if TYPE_CHECKING:
    from trainer.data.batch import Batch

SALT = 0x657261  # separates the noise from other random choices with the same key
PLACES = 1 << 20


def augment_on_device(batch: Batch, augment: AugmentConfig) -> Tensor:
    """Augmented images, ready to be mixed: batch on the device -> (b, 3, S, S) float32."""
    images = apply_policy(batch.images, batch.policy, codes_of(augment), augment)
    if augment.flip > 0:
        images = torch.where(batch.flip[:, None, None, None], images.flip(-1), images)
    images = normalise(images, augment)
    return erase(images, batch.erase, batch.rng_keys) if augment.erasing > 0 else images


def normalise(images: Tensor, augment: AugmentConfig) -> Tensor:
    """(b, 3, S, S) uint8 -> float32 with the mean and std of `augment`; equals timm's PrefetchLoader bit for bit."""
    mean, std = statistics(augment, images.device)
    return images.contiguous().float().sub_(mean).div_(std)  # batches come channels last


def erase(images: Tensor, boxes: Tensor, rng_keys: Tensor, table: Tensor | None = None) -> Tensor:
    """Fill a box of each image with normal noise, from `table` if given (`noise_table`).

    images: (b, 3, S, S) float; boxes: (b, 4) top, left, height, width, height 0 = none; rng_keys: (b,) int64, the keys of
    the noise.
    """
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    top, left, height, width = boxes.to(torch.int64).unbind(1)
    inside_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])  # (b, S)
    inside_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]  # (b, 1, S, S)
    return torch.where(inside, noise(rng_keys, tuple(images.shape[1:]), table).to(images.dtype), images)


def noise(rng_keys: Tensor, shape: tuple[int, ...], table: Tensor | None = None) -> Tensor:
    """Standard normal numbers: rng_keys (b,) int64 -> (b, *shape) float32, the same on any device and in any batch.

    Every row is a slice of one table, at an offset drawn by its key: hashing each pixel took a hundred times as long (16 images
    of 224 px on one CPU core: 150 ms against 1.2 ms), more than the rest of the device's augmentation.
    """
    length = torch.Size(shape).numel()
    places = (keyed_random.uniform(rng_keys, SALT) * PLACES).to(torch.int64)
    table = noise_table(length, rng_keys.device) if table is None else table
    return table.unfold(0, length, 1)[places].unflatten(1, shape)


def statistics(augment: AugmentConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixels in 0..255, each (1, 3, 1, 1) float32; made once."""
    return _statistics(augment.mean, augment.std, device)


def noise_table(length: int, device: torch.device) -> Tensor:
    """The table for rows of `length` numbers, float32; made once."""
    return _table(PLACES + length, device)


# Creating a tensor from host numbers is a host sync, so each is cached.


@lru_cache(maxsize=8)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    scaled = (torch.tensor([x * 255 for x in values], device=device).view(1, -1, 1, 1) for values in (mean, std))
    return next(scaled), next(scaled)


@lru_cache(maxsize=4)
def _table(length: int, device: torch.device) -> Tensor:
    """(length,) float32; made on the CPU: GPUs differ in the rounding of a logarithm."""
    return keyed_random.normal(torch.arange(length), SALT).to(device)
