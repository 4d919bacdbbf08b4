"""The host's part of the transform of one image: crop, resize, colour policy. Bytes in, uint8 out; `on_device` does the rest.

Every random choice comes from one generator seeded by (seed, epoch, example, copy), so an image looks the same on any rank and
worker. Distributions are timm's (`timm.data.transforms_factory`); flip and erasing are drawn here and applied on the device.
Evaluation is timm's evaluation transform itself, on PIL.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple, cast

import PIL.Image
import torch
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor
from torch.nn.functional import interpolate

from trainer.config.schema import AugmentConfig
from trainer.data.augment.decode import EncodedImage, as_tensor, decode_exact, refuse_long
from trainer.data.augment.device_jpeg import MAX_REDUCTION, DeviceJpeg, for_device
from trainer.data.augment.policy import policy_of
from trainer.data.augment.policy_draws import PolicyDraws

_ERASE_AREA, _ERASE_RATIO, _TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10  # timm's RandomErasing
_SRC_PADDING = 4  # DeiT-III's simple random crop


class AugmentedImage(NamedTuple):
    """One transformed image. pixels: (3, S, S) uint8, or (n,) uint8 of a JPEG that the device decodes; flip; erase: top, left, height,
    width (height 0 = none); policy: see `PolicyDraws`, empty where the pixels have it already; jpeg: height and width of the JPEG; top,
    left, height, width of its crop."""

    pixels: Tensor
    flip: bool = False
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)
    policy: Sequence[tuple[int, float]] = ()
    jpeg: tuple[int, ...] = ()


class Transform:
    """Bytes -> AugmentedImage. `train=False` is timm's evaluation transform, pixel for pixel, and draws nothing. on_device: JPEGs that the
    device can decode stay JPEGs."""

    def __init__(
        self, augment: AugmentConfig, image_size: int, train: bool, crop_pct: float = 0.875, *, on_device: bool = False
    ) -> None:
        self.augment, self.size, self.train, self.on_device = augment, image_size, train, on_device
        self._evaluate = transforms_imagenet_eval(
            image_size, crop_pct=crop_pct, interpolation=augment.interpolation, use_prefetcher=True
        )
        self._short_side = math.floor(image_size / crop_pct)  # timm resizes the short side to it
        draws = PolicyDraws(augment, image_size) if train and augment.policy_on == "device" else None
        self._draws, self._policy = draws, None if draws else policy_of(augment, image_size)
        self.layers = draws.layers if draws else 0  # of the policy on the device

    def __call__(self, data: memoryview, key: int = 0) -> AugmentedImage:
        """One image; raises BrokenImage with the reason. key: see `row_keys`."""
        return self.apply(self.decode(data), key)

    def decode(self, data: memoryview, copies: bool = False) -> EncodedImage | PIL.Image.Image | DeviceJpeg:
        """An image for `apply`. Without copies only the crop is decoded, with copies the whole image, once."""
        if not self.train:
            return decode_exact(data)
        if self.on_device and (jpeg := for_device(data)) is not None:
            return jpeg
        image = EncodedImage(data)
        if copies:
            image.whole()
        return image

    def apply(self, image: EncodedImage | PIL.Image.Image | DeviceJpeg, key: int = 0) -> AugmentedImage:
        """From an opened image. Raises BrokenImage."""
        if isinstance(image, PIL.Image.Image):
            refuse_long(image.width, image.height, self._short_side)
            return AugmentedImage(cast(Tensor, self._evaluate(image)))
        rng, flip, erase = self._generator(key)
        if isinstance(image, DeviceJpeg):
            crop = _resized_crop(rng, image.height, image.width, self.augment.scale, self.augment.ratio)
            if max(crop[2:]) <= MAX_REDUCTION * self.size:
                draws = self._draws(rng) if self._draws else ()
                return AugmentedImage(torch.from_numpy(image.data), flip, erase, draws, (image.height, image.width, *crop))
            image, rng = image.image, self._generator(key)[0]
        pixels = self._crop(image, rng)
        if self._draws is not None:
            return AugmentedImage(pixels, flip, erase, self._draws(rng))
        if self._policy is not None:
            done = self._policy(pixels.permute(1, 2, 0).numpy(), rng)
            pixels = as_tensor(done) if isinstance(done, PIL.Image.Image) else torch.from_numpy(done).permute(2, 0, 1)
        return AugmentedImage(pixels, flip, erase)

    def box(self, key: int, height: int, width: int) -> tuple[int, int, int, int] | None:
        """The crop of a height x width image with `augment.crop: rrc`: top, left, height, width. None for other crops."""
        if not self.train or self.augment.crop != "rrc":
            return None
        return _resized_crop(self._generator(key)[0], height, width, self.augment.scale, self.augment.ratio)

    def _generator(self, key: int) -> tuple[random.Random, bool, tuple[int, int, int, int]]:
        """(generator, flip, box to erase): the generator after its draws for the device."""
        rng, a = random.Random(key), self.augment
        flip = rng.random() < a.flip
        return rng, flip, _erase(rng, self.size) if rng.random() < a.erasing else (0, 0, 0, 0)

    def _crop(self, image: EncodedImage, rng: random.Random) -> Tensor:
        """(3, S, S) uint8, cropped by the method `augment.crop`."""
        size, a = self.size, self.augment
        height, width = image.size()
        if a.crop == "rrc":
            return self._resize(image.box(*_resized_crop(rng, height, width, a.scale, a.ratio)), size, size)
        refuse_long(width, height, size)
        pixels = image.whole()
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
        moved = torch.zeros(3, size, size, dtype=torch.uint8)  # the centre crop, shifted a few pixels, with a black border
        down, right = rng.randint(-a.shift, a.shift), rng.randint(-a.shift, a.shift)
        (to_y, from_y), (to_x, from_x) = _overlap(down, size), _overlap(right, size)
        moved[:, to_y, to_x] = pixels[:, from_y, from_x]
        return moved

    def _resize(self, pixels: Tensor, height: int, width: int) -> Tensor:
        return resized(pixels, height, width, self.augment.interpolation)


def resized(pixels: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """(3, H, W) uint8 -> (3, height, width) uint8."""
    if pixels.shape[1:] == (height, width):
        return pixels
    # torchvision calls the same uint8 kernel; with channels last it is 2.4 times as fast as through torchvision
    pixels = pixels[None].contiguous(memory_format=torch.channels_last)
    return interpolate(pixels, (height, width), mode=interpolation, antialias=True)[0]


def _mirrored(begin: int, size: int, side: int) -> Tensor:
    """Indices begin .. begin + size of an axis, mirrored at its first and last pixel."""
    index = torch.arange(begin, begin + size).abs()
    return torch.where(index < side, index, 2 * (side - 1) - index)


def _overlap(by: int, size: int) -> tuple[slice, slice]:
    """(target, source) slices on one axis of an image shifted by `by` pixels."""
    return slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size - max(by, 0))


def _resized_crop(
    rng: random.Random, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box of a random resized crop (Szegedy et al. 2015), drawn as in timm and torchvision: top, left, height, width."""
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
