"""Bytes of an image -> pixels: JPEG through torchvision, everything else through PIL, bombs and broken images refused."""

from __future__ import annotations

import io
from typing import cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

MAX_PIXELS = 89_478_485  # what PIL warns about; a larger image is refused as a decompression bomb


def header(data: bytes | memoryview) -> PIL.Image.Image:
    """The image with only its header read. Raises ValueError where it is no image or far too large."""
    try:
        image = PIL.Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError) as error:
        raise ValueError("no image" if isinstance(error, PIL.UnidentifiedImageError) else f"broken image: {error}") from None
    _refuse_bomb(image.width, image.height)
    return image


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}: refused as a decompression bomb")


def decode_exact(data: bytes | memoryview) -> PIL.Image.Image:
    """RGB as timm's and torchvision's loaders have it (EXIF orientation is not applied). Raises ValueError."""
    image = header(data)
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, MemoryError) as error:  # TypeError: a TIFF's torn tags
        raise ValueError(f"broken image: {error}") from None


def decode(data: memoryview) -> Tensor:
    """(3, H, W) uint8, as `decode_exact`; RGB and grey JPEG take torchvision's decoder, all else PIL's. Raises ValueError."""
    height, width, channels = _jpeg_shape(data)
    if channels not in (1, 3):
        return as_tensor(decode_exact(data))
    _refuse_bomb(width, height)
    try:
        return cast(Tensor, decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB))
    except RuntimeError as error:
        raise ValueError(f"broken image: {str(error).splitlines()[0]}") from None


def _jpeg_shape(data: memoryview) -> tuple[int, int, int]:
    """(height, width, channels) from a JPEG's frame header, (0, 0, 0) where there is none. 5 us; PIL's header takes 120."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8], data[at + 9]
        at += 1 if kind == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return 0, 0, 0


def as_tensor(image: PIL.Image.Image) -> Tensor:
    """RGB image -> (3, H, W) uint8, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
