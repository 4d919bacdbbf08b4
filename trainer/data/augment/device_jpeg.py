"""Which JPEGs the device decodes, and the bytes that it gets of them: `data.decode_on: device`.

nvJPEG must give the picture that the workers' decoder gives. So the device gets a JPEG that is one plain baseline scan of three colour
channels, as nearly all of ImageNet's are; the workers decode the rest. Metadata is left out: nvJPEG's callers apply the orientation of
EXIF, which timm's and torchvision's loaders do not, and thumbnails and profiles need room.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer.data.augment.decode import EncodedImage, frame, is_plain_scan

MAX_PIXELS = 1 << 24  # 48 MiB decoded; a batch may hold several
MAX_REDUCTION = 8  # source pixels per pixel on an axis: more make one image's resize as long as a whole batch's
_BASELINE, _SCAN, _ADOBE = 0xC0, 0xDA, 0xEE
FIELDS = 7  # of a row of `Batch.jpeg`: bytes of the JPEG (0: pixels, or nothing), its height, width; top, left, height, width of the crop
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


def row_bytes(lengths: np.ndarray, size: int) -> int:
    """Bytes of a row of a batch that may be a JPEG: as many as pixels need, and enough for 95 % of the files. A longer JPEG is decoded by
    the workers: which ones follows from the data set alone, not from ranks or batches. lengths: (n,) of the files."""
    return max(3 * size**2, int(np.quantile(lengths, 0.95)))
