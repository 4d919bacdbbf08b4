"""What happens to one image on the host: crop, resize, colour policy. Bytes in, uint8 out; the device does the rest.

Every random choice comes from one generator seeded by (seed, epoch, example, copy), so an image looks the same on any rank and
worker. Distributions are timm's (`timm.data.transforms_factory`); flip and erasing are drawn here and applied on the device.
Evaluation is timm's evaluation transform itself, on PIL.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import PIL.Image
import torch
from timm.data.auto_augment import (
    AutoAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from timm.data.transforms import str_to_pil_interp
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from trainer.data.decode import as_tensor, decode, decode_exact
from trainer.data.order import hashed
from trainer.sections import Augment

_ERASE_AREA, _ERASE_RATIO, _TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10  # timm's RandomErasing
_SRC_PADDING = 4  # DeiT-III's simple random crop


class Image(NamedTuple):
    """One image made ready. pixels: (3, S, S) uint8; flip; erase: top, left, height, width (height 0 = none)."""

    pixels: Tensor
    flip: bool = False
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)


def draw_keys(seed: int, epoch: int, ids: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """(b,) int64 key of every row: what all its random choices are keyed by, on the host and on the device."""
    return hashed(seed, epoch, ids, copies).view(np.int64)


class Transform:
    """Bytes -> Image. `train=False` is timm's evaluation transform, pixel for pixel, and draws nothing."""

    def __init__(self, augment: Augment, image_size: int, train: bool, crop_pct: float = 0.875) -> None:
        self.augment, self.size, self.train = augment, image_size, train
        self._evaluate = transforms_imagenet_eval(
            image_size, crop_pct=crop_pct, interpolation=augment.interpolation, use_prefetcher=True
        )
        self._policy = _policy(augment, image_size)

    def __call__(self, data: memoryview, key: int = 0) -> Image:
        """One image; raises ValueError saying what is wrong with it. key: see `draw_keys`."""
        return self.finish(self.decode(data), key)

    def decode(self, data: memoryview) -> Tensor | PIL.Image.Image:
        return decode(data) if self.train else decode_exact(data)

    def finish(self, decoded: Tensor | PIL.Image.Image, key: int = 0) -> Image:
        """From a decoded image: copies of it are decoded once."""
        if not isinstance(decoded, Tensor):
            return Image(cast(Tensor, self._evaluate(decoded)))
        rng, flip, erase = self._begun(key)
        pixels = self._crop(decoded, rng)
        if self._policy is not None:
            pixels = as_tensor(self._policy(PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()), rng))
        return Image(pixels, flip, erase)

    def box(self, key: int, height: int, width: int) -> tuple[int, int, int, int] | None:
        """Which part of a height x width image `augment.crop: rrc` shows: top, left, height, width. None for other crops."""
        if not self.train or self.augment.crop != "rrc":
            return None
        return _resized_crop(self._begun(key)[0], height, width, self.augment.scale, self.augment.ratio)

    def _begun(self, key: int) -> tuple[random.Random, bool, tuple[int, int, int, int]]:
        """The example's generator behind the draws that the device carries out: flip, box to erase."""
        rng, a = random.Random(key), self.augment
        flip = rng.random() < a.flip
        return rng, flip, _erase(rng, self.size) if rng.random() < a.erasing else (0, 0, 0, 0)

    def _crop(self, pixels: Tensor, rng: random.Random) -> Tensor:
        """(3, H, W) -> (3, S, S) by the rule of `augment.crop`."""
        size, a = self.size, self.augment
        height, width = pixels.shape[1:]
        if a.crop == "rrc":
            top, left, height, width = _resized_crop(rng, height, width, a.scale, a.ratio)
            return self._resize(pixels[:, top : top + height, left : left + width], size, size)
        short = min(height, width)
        height, width = max(size, int(height * size / short)), max(size, int(width * size / short))
        pixels = self._resize(pixels, height, width)
        if a.crop == "src":  # DeiT-III's simple random crop: the border is mirrored
            top, left = (rng.randint(-_SRC_PADDING, side - size + _SRC_PADDING) for side in (height, width))
            rows, columns = (_mirrored(begin, size, side) for begin, side in ((top, height), (left, width)))
            return pixels[:, rows][:, :, columns]
        top, left = (round((side - size) / 2) for side in (height, width))
        pixels = pixels[:, top : top + size, left : left + size]
        if a.crop == "none" or a.shift == 0:
            return pixels
        moved = torch.zeros(3, size, size, dtype=torch.uint8)  # the middle, moved a few pixels; black comes in
        down, right = rng.randint(-a.shift, a.shift), rng.randint(-a.shift, a.shift)
        (to_y, from_y), (to_x, from_x) = _overlap(down, size), _overlap(right, size)
        moved[:, to_y, to_x] = pixels[:, from_y, from_x]
        return moved

    def _resize(self, pixels: Tensor, height: int, width: int) -> Tensor:
        if pixels.shape[1:] == (height, width):
            return pixels
        # torch's uint8 kernel is the one torchvision takes; handed channels last it is 2.4 times as fast as through torchvision
        pixels = pixels[None].contiguous(memory_format=torch.channels_last)
        return interpolate(pixels, (height, width), mode=self.augment.interpolation, antialias=True)[0]


def _mirrored(begin: int, size: int, side: int) -> Tensor:
    """Indices begin .. begin + size of an axis, mirrored at its first and last pixel."""
    index = torch.arange(begin, begin + size).abs()
    return torch.where(index < side, index, 2 * (side - 1) - index)


def _overlap(by: int, size: int) -> tuple[slice, slice]:
    """(where to, where from) on one axis of an image moved by some pixels."""
    return slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size - max(by, 0))


def _resized_crop(
    rng: random.Random, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box of a random resized crop (Szegedy et al. 2015), drawn as timm and torchvision draw it: top, left, height, width."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area, aspect = rng.uniform(*scale) * height * width, math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = width, height  # the largest box of an allowed shape, in the middle
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _erase(rng: random.Random, size: int) -> tuple[int, int, int, int]:
    """Box of random erasing (Zhong et al. 2017) with timm's numbers: top, left, height, width."""
    for _ in range(_TRIES):
        area = rng.uniform(*_ERASE_AREA) * size * size
        aspect = math.exp(rng.uniform(math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < size and w < size:
            return rng.randint(0, size - h), rng.randint(0, size - w), h, w
    return 0, 0, 0, 0


Policy = Callable[[PIL.Image.Image, random.Random], PIL.Image.Image]


def _policy(augment: Augment, size: int) -> Policy | None:
    """Colour work on the cropped PIL image. As in timm, colour jitter stays out beside RandAugment and its kin."""
    if augment.policy == "none":
        return (lambda image, rng: _jitter(image, rng, augment.color_jitter)) if augment.color_jitter else None
    text = "3a" if augment.policy == "three_augment" else augment.policy  # DeiT-III: grey, solarise or blur
    settings = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * m)) for m in augment.mean),
        "interpolation": str_to_pil_interp(augment.interpolation),
    }
    try:
        if text.startswith("rand"):
            transform = rand_augment_transform(text, settings)
        elif text.startswith("augmix"):
            transform = augment_and_mix_transform(text, settings | {"translate_pct": 0.3})
        else:
            transform = auto_augment_transform(text, settings)
    except (AssertionError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"augment.policy={augment.policy!r}: timm doesn't know it ({error}); use 'none', 'three_augment' or timm's text "
            "form, e.g. 'rand-m9-mstd0.5-inc1'"
        ) from None

    for op in _ops(transform):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize

    def policy(image: PIL.Image.Image, rng: random.Random) -> PIL.Image.Image:
        with _seeded(rng.getrandbits(32)):
            image = transform(image)
        return _jitter(image, rng, augment.color_jitter) if "3a" in text else image

    return policy


def _ops(transform: Any) -> list[Any]:
    if isinstance(transform, AutoAugment):
        return [op for chain in transform.policy for op in chain]
    return list(transform.ops)


def _posterize(image: PIL.Image.Image, bits: int, **_: Any) -> PIL.Image.Image:
    """timm asks for 0 bits at the top magnitude (DeiT's rand-m9-mstd0.5-inc1 at +2 sigma), a black image; Pillow 13 refuses."""
    return posterize(image, bits) if bits > 0 else PIL.Image.new(image.mode, image.size)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """timm's policies draw from the global `random` and numpy generators: seed them around one example and put them back."""
    ours, theirs = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)


def _jitter(image: PIL.Image.Image, rng: random.Random, strength: float) -> PIL.Image.Image:
    """torchvision's ColorJitter(s, s, s): brightness, contrast, saturation by 1 - s .. 1 + s, in random order."""
    if not strength:
        return image
    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    rng.shuffle(steps)
    for step in steps:
        image = step(image, rng.uniform(max(0.0, 1 - strength), 1 + strength))  # pyright: ignore[reportArgumentType]
    return image
