"""Mixup and cutmix of neighbours: images 2i and 2i+1 of the global batch are each other's partner.

One draw per optimizer step, keyed by (seed, step), in timm's "batch" mode with timm's distributions; neighbours instead of
timm's flip of the local batch, so that the pairs don't depend on the number of processes or on accumulation. Mixup (Zhang et
al. 2018): x = lam * own + (1 - lam) * partner. Cutmix (Yun et al. 2019): a box of the partner is pasted, and lam becomes the
share of the remaining area.

Letters: b rows of a micro-batch (even; pairs are never split), S side of an image, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.config.schema import AugmentConfig

KEY = 0x6D6978  # separates this random stream from others with the same seed and step
CLEAR = 0.75  # own share from which a mixed image gives the result of an unmixed one, see docs/results/forgetting-rules.md


class Mix(NamedTuple):
    """The mix of a step: the own share `lam` in [0, 1], and for cutmix the partner's box (top, bottom, left, right).

    numbers: `numbers(mix)` on the device, for compiled graphs, to which another Python number would be another graph.
    """

    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None
    numbers: Tensor | None = None

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """Whether images are mixed, whether the own image has the smaller share, and whether neither has a share >= CLEAR."""
        return self.lam < 1.0, self.lam < 0.5, max(self.lam, 1 - self.lam) < CLEAR


NO_MIX = Mix()


def draw_mix(augment: AugmentConfig, seed: int, step: int, image_size: int) -> Mix:
    """The mix of an optimizer step, equal on all ranks and for every micro-batch of the step."""
    return sample(augment, np.random.default_rng([KEY, seed, step]), image_size)


def sample(augment: AugmentConfig, rng: np.random.Generator, image_size: int) -> Mix:
    """One draw with timm's distributions, in the order in which timm's `Mixup` consumes its random numbers."""
    mixup, cutmix = augment.mixup > 0, augment.cutmix > 0
    if not (mixup or cutmix) or rng.random() >= augment.mix_probability:
        return NO_MIX
    cut = cutmix and (not mixup or rng.random() < augment.mix_switch)
    alpha = augment.cutmix if cut else augment.mixup
    lam = float(rng.beta(alpha, alpha))
    if not cut or lam == 1.0:
        return Mix(lam)
    side = int(image_size * np.sqrt(1 - lam))
    y, x = int(rng.integers(0, image_size)), int(rng.integers(0, image_size))
    top, bottom = max(y - side // 2, 0), min(y + (side + 1) // 2, image_size)
    left, right = max(x - side // 2, 0), min(x + (side + 1) // 2, image_size)
    area = (bottom - top) * (right - left)  # the box clipped at the border gives the shares
    return Mix(1.0 - area / float(image_size * image_size), (top, bottom, left, right))


def numbers(mix: Mix) -> Tensor:
    """The mix as eight numbers, float32: own share; top, bottom, left, right of the partner's box, an empty box for none; its flags."""
    return torch.tensor([mix.lam, *(mix.box or (0, 0, 0, 0)), *mix.flags], dtype=torch.float32)


def flags_of(numbers: Tensor) -> tuple[Tensor, ...]:
    """`Mix.flags` of `numbers`, each a 0-dim bool on its device."""
    return (numbers[5:] > 0).unbind()


def partners(rows: Tensor) -> Tensor:
    """Each row's partner: (b, ...) -> (b, ...), rows 2i and 2i+1 swapped."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def shares(mix: Mix, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Own and partner's share of every row, each (b,) float32.

    A row whose partner has weight 0 (broken image, padding) stays unmixed: (1, 0).
    """
    there = partners(weights) > 0
    one = torch.ones_like(weights, dtype=torch.float32)
    return torch.where(there, mix.lam * one, one), torch.where(there, (1.0 - mix.lam) * one, 0.0)


def mix_images(images: Tensor, mix: Mix, weights: Tensor) -> Tensor:
    """Mixed images: (b, 3, S, S) float -> the same shape; rows with `weights` (b,) 0 are not mixed into their partner."""
    if mix.lam == 1.0:
        return images
    if mix.box is None:
        own, other = (share.to(images.dtype).view(-1, 1, 1, 1) for share in shares(mix, weights))
        # 0 x NaN would be NaN, but broken rows hold zeros (see Batch)
        return images * own + partners(images) * other
    top, bottom, left, right = mix.box
    there = (partners(weights) > 0).view(-1, 1, 1, 1)
    patch = images[:, :, top:bottom, left:right]
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = torch.where(there, partners(patch), patch)
    return mixed


def mix_targets(labels: Tensor, mix: Mix, weights: Tensor, classes: int, smoothing: float) -> Tensor:
    """Soft targets: labels (b,) int64 -> (b, C) float32 with rows that sum to 1.

    Smoothing as in timm: off = smoothing / C, on = 1 - smoothing + off, on both partners before mixing.
    """
    off = smoothing / classes
    hard = torch.full((len(labels), classes), off, device=labels.device, dtype=torch.float32)
    # padding may carry label -1; its weight is 0
    hard.scatter_(1, labels.clamp(min=0)[:, None], 1.0 - smoothing + off)
    if mix.lam == 1.0:
        return hard
    own, other = shares(mix, weights)
    return hard * own[:, None] + partners(hard) * other[:, None]
