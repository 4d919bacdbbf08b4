"""`data.decode_on: device`: the JPEGs of a batch -> its pixels on the device.

On a GPU nvJPEG decodes them, through TorchCodec, and one kernel crops and resizes them (`resize_kernel`). An image that nvJPEG refuses is
decoded by the host, so a damaged one is as broken as it is in a worker; a decoder that fails for another reason ends the run. On a CPU
the host decodes all, with the pixels of `data.decode_on: workers`.
"""

from __future__ import annotations

import base64
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config.errors import ConfigError
from trainer.data.augment.decode import BrokenImage, EncodedImage
from trainer.data.augment.transform import resized
from trainer.data.batch import Batch
from trainer.data.errors import DataError

CHUNK = 256 << 20  # bytes of decoded pictures at a time, twice that with their copy for the kernel
# 8 x 8 grey-blue pixels: a JPEG that every decoder decodes
SAMPLE = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/"
    "2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAARCAAIAAgDASIAAhEBAxEB/8QA"
    "FQABAQAAAAAAAAAAAAAAAAAAAAT/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAAAAAAAwT/xAAUEQEAAAAAAAAAAAAAAAAAAAAA/9oA"
    "DAMBAAIRAxEAPwCIBUN//9k="
)
Where = Callable[[int], str]  # example -> its place in the shards
_Jpeg = tuple[Tensor, tuple[int, int]]  # (n,) uint8; height, width


class DeviceDecoder:
    """Call it with a Batch of the loader; it returns the Batch with pixels, on the device. refused: images that the host decoded because
    nvJPEG did not.

    size: side of an image; where: names an example. Raises ConfigError for a GPU without a TorchCodec that decodes on it.
    """

    def __init__(self, size: int, interpolation: str, where: Where, device: torch.device) -> None:
        self._size, self._interpolation, self._where, self.device = size, interpolation, where, device
        self.refused = 0
        self._nvjpeg = nvjpeg() if device.type == "cuda" else None
        if self._nvjpeg is not None and (reason := self._fails()):
            raise ConfigError(
                f"data.decode_on=device: nvJPEG does not decode on {device} ({reason}); set data.decode_on=workers"
            )

    def __call__(self, batch: Batch) -> Batch:
        fields, ids = batch.jpeg.tolist(), batch.ids.tolist()
        rows = [row for row, (length, *_) in enumerate(fields) if length]
        first = {ids[row]: row for row in reversed(rows)}  # copies of an image are decoded once
        jpegs = {one: (batch.images[row, : fields[row][0]], (fields[row][1], fields[row][2])) for one, row in first.items()}
        images = torch.zeros((len(ids), self._size, self._size, 3), dtype=torch.uint8, device=self.device)
        broken = dict(batch.broken)
        for chunk in _chunks(jpegs):
            pictures = dict(zip(chunk, self._decoded({one: jpegs[one] for one in chunk}), strict=True))
            broken |= {one: f"{self._where(one)}: {why}" for one, why in pictures.items() if isinstance(why, BrokenImage)}
            crops = [(row, found, fields[row][3:]) for row in rows if isinstance(found := pictures.get(ids[row]), Tensor)]
            if crops:
                (self._crop_by_host if self._nvjpeg is None else self._crop_by_device)(crops, images)
        pixels = [row for row, (length, *_) in enumerate(fields) if not length]
        if pixels:
            there = batch.images[pixels, : images[0].numel()].view(-1, *images.shape[1:])
            images[torch.tensor(pixels, device=self.device)] = there.to(self.device)
        lost = [row for row, one in enumerate(ids) if one in broken]
        if lost:  # as the workers leave a broken image: black, of weight 0, nothing drawn, all of its copies
            for field in (batch.weights, batch.policy, batch.flip, batch.erase):
                field[lost] = 0  # in place: a copy would not be in pinned memory
            images[torch.tensor(lost, device=self.device)] = 0
        return batch._replace(images=images.permute(0, 3, 1, 2), jpeg=batch.jpeg[:, :0], broken=sorted(broken.items()))

    def _decoded(self, jpegs: dict[int, _Jpeg]) -> list[Tensor | BrokenImage]:
        """(3, H, W) uint8 of each, on the device, or why it is broken. A chunk that nvJPEG refuses is decoded image by image, so that the
        pixels of the others do not depend on it."""
        if self._nvjpeg is None:
            return [_by_host(data) for data, _ in jpegs.values()]
        try:
            found = self._nvjpeg([data for data, _ in jpegs.values()], mode="RGB", device=self.device)
            if all(one.shape[1:] == size for one, (_, size) in zip(found, jpegs.values(), strict=True)):
                return found
            error = RuntimeError("another size than in the header")
        except RuntimeError as raised:
            error = raised
        if len(jpegs) > 1:
            return [picture for one, jpeg in jpegs.items() for picture in self._decoded({one: jpeg})]
        ((example, (data, _)),) = jpegs.items()
        reason = _first_line(error)
        if "out of memory" in reason or reason.endswith(": 5") or self._fails():  # 5: nvJPEG's allocator
            raise DataError(f"data.decode_on=device: nvJPEG failed on {self.device}: {reason}; lower data.batch, or set "
                            "data.decode_on=workers") from error  # fmt: skip
        self.refused += 1
        warnings.warn(f"{self._where(example)}: refused by nvJPEG ({reason}), decoded by the host", stacklevel=2)
        picture = _by_host(data)
        return [picture.to(self.device) if isinstance(picture, Tensor) else picture]

    def _fails(self) -> str:
        """Why nvJPEG does not decode an image in order; empty if it does."""
        assert self._nvjpeg is not None
        try:
            self._nvjpeg([torch.frombuffer(bytearray(SAMPLE), dtype=torch.uint8)], mode="RGB", device=self.device)
        except RuntimeError as error:
            return _first_line(error)
        return ""

    def _crop_by_host(self, crops: list[tuple[int, Tensor, list[int]]], images: Tensor) -> None:
        """Fill rows of images (b, S, S, 3). crops: (row, picture (3, H, W), [top, left, height, width])."""
        for row, picture, (top, left, height, width) in crops:
            crop = picture[:, top : top + height, left : left + width]
            images[row] = resized(crop, self._size, self._size, self._interpolation).permute(1, 2, 0)

    def _crop_by_device(self, crops: list[tuple[int, Tensor, list[int]]], images: Tensor) -> None:
        """The same in one launch."""
        from trainer.data.augment.resize_kernel import resized_crops

        once = {id(picture): picture for _, picture, _ in crops}
        lengths = np.array([picture.numel() for picture in once.values()])
        begin = dict(zip(once, (np.cumsum(lengths) - lengths).tolist(), strict=True))
        table = [[row, begin[id(picture)], *picture.shape[1:], *crop] for row, picture, crop in crops]
        pixels = torch.cat([picture.flatten() for picture in once.values()])
        resized_crops(pixels, torch.tensor(table, device=self.device), images, self._interpolation)


def _chunks(jpegs: dict[int, _Jpeg]) -> Iterator[list[int]]:
    """Their keys, in order, in lists of at most CHUNK bytes of pixels, or of one."""
    chunk: list[int] = []
    total = 0
    for one, (_, (height, width)) in jpegs.items():
        if chunk and total + 3 * height * width > CHUNK:
            yield chunk
            chunk, total = [], 0
        chunk.append(one)
        total += 3 * height * width
    if chunk:
        yield chunk


def _by_host(jpeg: Tensor) -> Tensor | BrokenImage:
    try:
        return EncodedImage(jpeg.numpy().data).whole()
    except BrokenImage as error:
        return error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nvjpeg() -> Any:
    """TorchCodec's decoder of lists of JPEGs. Raises ConfigError."""
    remedy = "set data.decode_on=workers, or"
    if importlib.util.find_spec("torchcodec") is None:
        raise ConfigError(f"data.decode_on=device: TorchCodec is not installed; {remedy} pip install 'trilevel[nvjpeg]'")
    try:
        from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.decode_on=device: TorchCodec does not load ({_first_line(error)}); {remedy} install a version >= 0.16 built for CUDA "
            f"{torch.version.cuda}, as torch {torch.__version__} is"
        ) from None
    return decode_jpeg
