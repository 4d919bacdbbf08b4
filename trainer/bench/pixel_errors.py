"""Pixel errors of each fast path relative to PIL on the same input; printed by `trilevel bench input`."""

from __future__ import annotations

import random

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch

from trainer.config.schema import AugmentConfig, DataConfig
from trainer.data.augment import turbojpeg
from trainer.data.augment.decode import BrokenImage, EncodedImage, decode_exact
from trainer.data.augment.decode_on_device import DeviceDecoder
from trainer.data.augment.policy import smoothed
from trainer.data.augment.shear import sheared
from trainer.data.augment.transform import Transform
from trainer.data.loader.batch_maker import BatchMaker
from trainer.data.order import Rows
from trainer.data.shards.index import Index
from trainer.data.shards.reader import Reader

IMAGES = 64
_FILL = (124, 116, 104)


def pixel_errors(index: Index, size: int, images: int = IMAGES) -> list[str]:
    """A line for each fast path, over up to `images` images: mean and largest error in grey levels of 255."""
    library = "TurboJPEG" if turbojpeg.library() else "PIL"
    paths = {
        f"decoding, {library}": "PIL's decoder",
        f"decoding of the crop, {library}": "the whole, decoded by PIL",
        "resize, torch uint8": "PIL's resize of the same crop",
        "shear, four taps": "PIL's transform of the same image",
        "translation, four taps": "PIL's transform of the same image",
        "smoothing under sharpness": "PIL's filter of the same image",
    }
    found: list[list[tuple[float, int]]] = [[] for _ in paths]
    transform, numbers = Transform(AugmentConfig(), size, train=True), np.arange(min(images, len(index)))
    for number, data in zip(numbers.tolist(), Reader(index).read(numbers), strict=True):
        if not isinstance(data, memoryview):
            continue
        try:
            pairs = _pairs(transform, number, data)
        except BrokenImage:
            continue
        for errors, (ours, pils) in zip(found, pairs, strict=True):
            error = np.abs(ours.astype(np.int16) - pils)
            errors.append((float(error.mean()), int(error.max())))
    return [
        f"{name}, compared with {what}: mean error {np.mean([m for m, _ in errors]):.4f}, largest {max(w for _, w in errors)} of 255, "
        f"over {len(errors)} images"
        for (name, what), errors in zip(paths.items(), found, strict=True)
        if errors
    ]


def _pairs(transform: Transform, number: int, data: memoryview) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ours, PIL's) of each path."""
    exact, whole = np.asarray(decode_exact(data)), EncodedImage(data).whole().permute(1, 2, 0).numpy()
    top, left, height, width = transform.box(number, *exact.shape[:2]) or (0, 0, *exact.shape[:2])
    cut = EncodedImage(data).box(top, left, height, width)
    pil = PIL.Image.fromarray(np.ascontiguousarray(cut.permute(1, 2, 0).numpy()))
    side = (transform.size, transform.size)
    resized = transform.apply(EncodedImage(data), number).pixels.permute(1, 2, 0).numpy()
    image = pil.resize(side, PIL.Image.Resampling.BICUBIC)
    pixels, rng = np.array(image), random.Random(number)
    factor, offset = rng.uniform(-0.3, 0.3), rng.uniform(-0.45, 0.45) * transform.size
    moved = [
        (sheared(pixels, a, b, _FILL), np.asarray(image.transform(
            side, PIL.Image.Transform.AFFINE, (1, a, b, 0, 1, 0), PIL.Image.Resampling.BICUBIC, fillcolor=_FILL
        )))
        for a, b in ((factor, 0.0), (0.0, offset))
    ]  # fmt: skip
    smooth = np.asarray(image.filter(PIL.ImageFilter.SMOOTH))
    part = exact[top : top + height, left : left + width]
    return [
        (whole, exact),
        (cut.permute(1, 2, 0).numpy(), part),
        (resized, np.asarray(image)),
        *moved,
        (smoothed(pixels), smooth),
    ]


def device_errors(index: Index, data: DataConfig, size: int, device: torch.device, images: int = IMAGES) -> dict[str, float]:
    """`data.decode_on: device` beside `workers`, both after crop and resize: images that the device decoded and that it refused, and errors
    in grey levels of 255: mean of all, mean of the worst image, largest."""
    ids = np.arange(min(images, len(index)))
    rows = Rows(ids, np.zeros_like(ids))
    left, theirs = (
        BatchMaker(index, data, Transform(AugmentConfig(), size, train=True, on_device=there), 0).batch(0, rows, len(ids))
        for there in (True, False)
    )
    on_device = left.jpeg[:, 0] > 0
    decoder = DeviceDecoder(size, AugmentConfig().interpolation, index.where, device)
    mine = decoder(left)
    error = (mine.images.cpu()[on_device].int() - theirs.images[on_device].int()).abs().float()
    worst = error.flatten(1).mean(1).max()
    return {"images": int(on_device.sum()) - decoder.refused, "refused": decoder.refused, "mean": float(error.mean()),
            "worst": float(worst), "largest": float(error.max())}  # fmt: skip
