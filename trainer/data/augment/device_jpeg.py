"""Which JPEGs the device decodes, and the bytes that it gets of them: `data.decode_on: device`.

nvJPEG must give the picture that the workers' decoder gives. So the device gets a JPEG that is one plain baseline scan of three colour
channels, as nearly all of ImageNet's are; the workers decode the rest. Metadata is left out: nvJPEG's callers apply the orientation of
EXIF, which timm's and torchvision's loaders do not, and thumbnails and profiles need room.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from trainer.data.augment.decode import EncodedImage, frame, is_plain_scan

MAX_PIXELS = 1 << 24  # 48 MiB decoded; a batch may hold several
MAX_REDUCTION = 8  # source pixels per pixel on an axis: more make one image's resize as long as a whole batch's
_BASELINE, _SCAN, _ADOBE = 0xC0, 0xDA, 0xEE
_METADATA = frozenset([*range(0xE1, 0xEE), 0xEF, 0xFE])  # APP1 .. APP13, APP15, COM
_YCBCR = (1, 2, 3)  # component numbers; libjpeg takes others as RGB, or guesses


class DeviceJpeg(NamedTuple):
    """A JPEG for the device. data: (n,) uint8, without metadata; height, width: of the picture; image: for the workers' decoder."""

    data: np.ndarray
    height: int
    width: int
    image: EncodedImage


def for_device(data: memoryview) -> DeviceJpeg | None:
    """The JPEG for the device; None: the workers decode it."""
    found = frame(data)
    if found.kind != _BASELINE or found.channels != 3 or not 0 < found.height * found.width <= MAX_PIXELS:
        return None
    if not is_plain_scan(data, found) or (bare := _without_metadata(data)) is None:
        return None
    return DeviceJpeg(bare, found.height, found.width, EncodedImage(data))


def _without_metadata(data: memoryview) -> np.ndarray | None:
    """(n,) uint8; None for a JPEG whose colours are not YCbCr. `frame` has parsed the segments before."""
    source = np.frombuffer(data, dtype=np.uint8)
    kept, at = [source[:2]], 2
    while (kind := data[at + 1]) != _SCAN:
        if kind == 0xFF or 0xD0 <= kind <= 0xD7:  # a fill byte, RST: no length
            at += 1 if kind == 0xFF else 2
            continue
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if kind == _BASELINE and tuple(data[at + 10 : at + 19 : 3]) != _YCBCR:
            return None
        if kind == _ADOBE and not (end == at + 16 and data[at + 4 : at + 9] == b"Adobe" and data[at + 15] == 1):
            return None
        if kind not in _METADATA:
            kept.append(source[at:end])
        at = end
    return np.concatenate([*kept, source[at:]])


class JpegMemory:
    """JPEGs and pixels of a batch in the memory of its images, so that neither the loader's buffers nor the copies between processes
    change: JPEGs from its beginning, pixels of the workers from its end. A row brings the bytes of its pixels, and what its JPEG leaves of
    them is room for later ones: at 224 px ImageNet's files have 110 kB in the mean, a row 150.

    images: (b, 3, S, S) uint8, channels last in memory; rows: that will be placed, in order, each after `next_row`.
    """

    FIELDS = 6  # of a row of `Batch.jpeg`: begin, bytes of the JPEG (0: pixels); top, left, height, width of its crop
    NOTHING = (-1, 0, 0, 0, 0, 0)  # of padding and broken images

    def __init__(self, images: Tensor, rows: int) -> None:
        self._memory = flat(images).numpy()
        self._row_bytes, self._low, self._high, self._rows = images[0].numel(), 0, len(self._memory), rows

    def next_row(self) -> None:
        self._rows -= 1

    def has_room(self, jpeg: Tensor) -> bool:
        """Whether the rows after it still have room for their pixels."""
        return self._low + len(jpeg) + self._rows * self._row_bytes <= self._high

    def put(self, pixels: Tensor, crop: tuple[int, int, int, int]) -> tuple[int, ...]:
        """The row of `Batch.jpeg`. pixels: (3, S, S) uint8, or (n,) of a JPEG."""
        if pixels.ndim == 1:
            begin, self._low = self._low, self._low + len(pixels)
            self._memory[begin : self._low] = pixels.numpy()
            return begin, len(pixels), *crop
        self._high -= self._row_bytes
        self._memory[self._high : self._high + self._row_bytes] = pixels.permute(1, 2, 0).reshape(-1).numpy()
        return self._high, 0, *crop


def flat(images: Tensor) -> Tensor:
    """(b, 3, S, S), channels last in memory -> (b S S 3,), the same memory."""
    return images.permute(0, 2, 3, 1).view(-1)
