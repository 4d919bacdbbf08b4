"""`data.decode_on: device`: the JPEGs of a batch -> its pixels on the device.

On a GPU nvJPEG decodes them, through TorchCodec, and one kernel crops and resizes them (`resize_kernel`). An image that nvJPEG refuses is
decoded by the host, so a damaged one is as broken as it is in a worker. On a CPU the host decodes all, with the pixels of
`data.decode_on: workers`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config.errors import ConfigError
from trainer.data.augment.decode import BrokenImage, EncodedImage
from trainer.data.augment.device_jpeg import flat
from trainer.data.augment.transform import resized
from trainer.data.batch import Batch

_REMEDY = "pip install 'trilevel[nvjpeg]' (version 0.16 or later), or set data.decode_on=workers"
Where = Callable[[int], str]  # example -> its place in the shards


class DeviceDecoder:
    """Call it with a Batch of the loader; it returns the Batch with pixels, on the device. where: names an example of a broken image.

    Raises ConfigError for a GPU without TorchCodec."""

    def __init__(self, interpolation: str, where: Where, device: torch.device) -> None:
        self._interpolation, self._where, self.device = interpolation, where, device
        self._nvjpeg = _nvjpeg() if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        memory, length = flat(batch.images), batch.jpeg[:, 1]
        rows = length.nonzero().flatten().tolist()
        _, first, same = np.unique(batch.ids[rows].numpy(), return_index=True, return_inverse=True)  # copies are decoded once
        jpegs = [memory[begin : begin + n] for begin, n in batch.jpeg[rows, :2][torch.from_numpy(first)].tolist()]
        pictures = self._by_host(jpegs) if self._nvjpeg is None else self._by_device(jpegs)
        found = {row: pictures[one] for row, one in zip(rows, same.tolist(), strict=True)}
        batch = _without(batch, {row: str(one) for row, one in found.items() if isinstance(one, BrokenImage)}, self._where)
        crops = {row: one for row, one in found.items() if isinstance(one, Tensor)}
        images = torch.zeros_like(batch.images.permute(0, 2, 3, 1), device=self.device)
        self._copy(batch, memory, images)
        if crops:
            (self._crop_by_host if self._nvjpeg is None else self._crop_by_device)(batch, crops, images)
        return batch._replace(images=images.permute(0, 3, 1, 2), jpeg=batch.jpeg[:, :0])

    def _copy(self, batch: Batch, memory: Tensor, images: Tensor) -> None:
        """The rows that are pixels."""
        rows = ((batch.jpeg[:, 0] >= 0) & (batch.jpeg[:, 1] == 0)).nonzero().flatten()
        if len(rows):
            size = images[0].numel()
            pixels = torch.stack([memory[begin : begin + size] for begin in batch.jpeg[rows, 0].tolist()])
            images[rows.to(self.device)] = pixels.view(-1, *images.shape[1:]).to(self.device)

    def _by_host(self, jpegs: list[Tensor]) -> list[Tensor | BrokenImage]:
        """(3, H, W) uint8 of each on the host, or why it is broken."""
        return [_decoded(jpeg) for jpeg in jpegs]

    def _by_device(self, jpegs: list[Tensor]) -> list[Tensor | BrokenImage]:
        """The same on the device. A batch with an image that nvJPEG refuses is decoded image by image, so that the pixels of the others
        do not depend on it."""
        assert self._nvjpeg is not None
        if not jpegs:
            return []
        try:
            return self._nvjpeg(jpegs, mode="RGB", device=self.device)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if len(jpegs) > 1:
                return [picture for jpeg in jpegs for picture in self._by_device([jpeg])]
        found = _decoded(jpegs[0])
        return [found.to(self.device) if isinstance(found, Tensor) else found]

    def _crop_by_host(self, batch: Batch, pictures: dict[int, Tensor], images: Tensor) -> None:
        """Fill rows of images (b, S, S, 3) from pictures, each (3, H, W)."""
        size = images.shape[1]
        for row, picture in pictures.items():
            top, left, height, width = batch.jpeg[row, 2:].tolist()
            crop = picture[:, top : top + height, left : left + width]
            images[row] = resized(crop, size, size, self._interpolation).permute(1, 2, 0)

    def _crop_by_device(self, batch: Batch, pictures: dict[int, Tensor], images: Tensor) -> None:
        """The same in one launch."""
        from trainer.data.augment.resize_kernel import resized_crops

        once = {id(picture): picture for picture in pictures.values()}
        lengths = np.array([picture.numel() for picture in once.values()])
        begin = dict(zip(once, (np.cumsum(lengths) - lengths).tolist(), strict=True))
        table = [[row, begin[id(one)], *one.shape[1:], *batch.jpeg[row, 2:].tolist()] for row, one in pictures.items()]
        pixels = torch.cat([picture.flatten() for picture in once.values()])
        resized_crops(pixels, torch.tensor(table, device=self.device), images, self._interpolation)


def _decoded(jpeg: Tensor) -> Tensor | BrokenImage:
    try:
        return EncodedImage(jpeg.numpy().data).whole()
    except BrokenImage as error:
        return error


def _without(batch: Batch, broken: dict[int, str], where: Where) -> Batch:
    """The batch with these rows as the workers leave a broken image: weight 0, nothing drawn, and named."""
    if not broken:
        return batch
    rows = list(broken)
    for field in (batch.weights, batch.policy, batch.flip, batch.erase):
        field[rows] = 0  # in place: copies would not be in pinned memory
    found = {int(batch.ids[row]): reason for row, reason in broken.items()}
    named = [(example, f"{where(example)}: {reason}") for example, reason in found.items()]
    return batch._replace(broken=sorted([*batch.broken, *named], key=itemgetter(0)))


def refuse_without_nvjpeg() -> None:
    """Raises ConfigError where there is a GPU and no TorchCodec, before workers are started and images are read."""
    if torch.cuda.is_available() and importlib.util.find_spec("torchcodec") is None:
        raise ConfigError(f"data.decode_on=device: TorchCodec is not installed: {_REMEDY}")


def _nvjpeg() -> Any:
    """TorchCodec's decoder."""
    try:
        from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"data.decode_on=device: TorchCodec ({type(error).__name__}: {reason}): {_REMEDY}") from None
    return decode_jpeg
