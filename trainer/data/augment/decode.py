"""Bytes of an image -> pixels: JPEG by TurboJPEG if it is installed, all else by PIL. The pixels equal PIL's bit for bit, and PIL
decides which images are broken. Decompression bombs and broken images raise BrokenImage."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from trainer.config.errors import TrilevelError
from trainer.data.augment import turbojpeg

MAX_PIXELS = 89_478_485  # PIL's limit for its warning; a larger image is treated as a decompression bomb


# The only formats PIL may open: its EPS plugin starts Ghostscript, others raise arbitrary exceptions on damaged files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
_GREY_16 = ("PNG", "PPM")  # PIL opens their 16-bit grey as 32-bit integers


class BrokenImage(TrilevelError, ValueError):
    """An image that cannot be decoded; the message gives the reason in one line."""


def header(data: bytes | memoryview) -> PIL.Image.Image:
    """The image with only its header read. Raises BrokenImage for bytes that are not an image, and above MAX_PIXELS."""
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # decoders raise arbitrary exceptions on damaged bytes
        raise BrokenImage("no image" if isinstance(error, PIL.UnidentifiedImageError) else _reason(error)) from None
    _refuse_bomb(image.width, image.height)
    return image


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"broken image: {text or type(error).__name__}"


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels, must be <= {MAX_PIXELS} (decompression bomb)")


def refuse_long(width: int, height: int, short_side: int) -> None:
    """Raise BrokenImage for an image so long that it exceeds MAX_PIXELS after a resize of its short side: 65,500 x 1 pixels, a PNG of 270
    bytes, become 4 x 10^9."""
    if max(width, height) * short_side**2 > MAX_PIXELS * min(width, height):
        raise BrokenImage(
            f"{width} x {height} pixels, resized to a short side of {short_side}, are more than {MAX_PIXELS} "
            "(decompression bomb)"
        )


def decode_exact(data: bytes | memoryview) -> PIL.Image.Image:
    """RGB as in timm's and torchvision's loaders (EXIF orientation is not applied), but of 16-bit grey images: see `as_rgb`. Raises
    BrokenImage."""
    image = header(data)
    try:
        return as_rgb(image)
    except BrokenImage:
        raise
    except Exception as error:
        raise BrokenImage(_reason(error)) from None


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as 8-bit RGB. Of 16-bit grey it keeps the high byte, as PIL does of 16-bit RGB; PIL's own conversion clips every value
    above 255 to white. Raises BrokenImage for 32-bit integers and floats, whose range the file does not tell."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _GREY_16):
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenImage("32 bits per channel, of unknown range: convert it to 8 or 16 bits")
    return image.convert("RGB")


def decode(data: bytes | memoryview) -> Tensor:
    """(3, H, W) uint8, as `decode_exact`; RGB and grey JPEG by TurboJPEG, all else by PIL. Raises BrokenImage."""
    return EncodedImage(data).whole()


class EncodedImage:
    """An image that is decoded on first use; copies of an example share one.

    With TurboJPEG only the box of a JPEG is decoded: the same pixels in less time. A JPEG of more than one plain scan is decoded
    whole, and by PIL if TurboJPEG warns, so that whether an image is broken depends neither on the library nor on the box.
    Raises BrokenImage, here or at the first decode.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._frame = data, frame(data)
        self._pixels: Tensor | None = None
        if self._frame.channels in (1, 3):
            _refuse_bomb(self._frame.width, self._frame.height)
        else:  # CMYK, or not a JPEG
            self._pixels = as_tensor(decode_exact(data))

    @classmethod
    def of(cls, pixels: Tensor) -> EncodedImage:
        """From decoded pixels: (3, H, W) uint8."""
        picture = cls.__new__(cls)
        picture._data, picture._frame, picture._pixels = b"", Frame(0, 0, 0, 0, 0), pixels
        return picture

    def size(self) -> tuple[int, int]:
        """(H, W)."""
        if self._pixels is None and self._frame.height and self._frame.width:
            return self._frame.height, self._frame.width
        height, width = self.whole().shape[1:]
        return height, width

    def whole(self) -> Tensor:
        """(3, H, W) uint8."""
        if self._pixels is None:
            size = self._frame.height, self._frame.width
            cut = turbojpeg.cut(self._data, (0, 0, *size), size)
            pixels = as_tensor(decode_exact(self._data) if cut is None else cut)
            if pixels.shape[1:] != size:
                height, width = pixels.shape[1:]
                raise BrokenImage(f"broken image: {size[1]} x {size[0]} pixels in its header, {width} x {height} decoded")
            self._pixels = pixels
        return self._pixels

    def box(self, top: int, left: int, height: int, width: int) -> Tensor:
        """(3, height, width) uint8: that part of `whole`."""
        if self._pixels is None and is_plain_scan(self._data, self._frame):
            pixels = turbojpeg.cut(self._data, (top, left, height, width), (self._frame.height, self._frame.width))
            if pixels is not None:
                return as_tensor(pixels)
        return self.whole()[:, top : top + height, left : left + width]


_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF
_SEGMENTS = frozenset([0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE])  # DHT, DAC, DQT, DNL, DRI, APP, COM


class Frame(NamedTuple):
    """A JPEG's frame header; all 0 if none was found. kind: number of the SOF marker; scan: where the first scan begins."""

    height: int
    width: int
    channels: int
    kind: int
    scan: int


def frame(data: bytes | memoryview) -> Frame:
    """From the markers before the first scan, parsed as by libjpeg: markers that it would skip or reject give an empty Frame, and
    PIL decodes. 7 us; PIL's header takes 120."""
    at, found = 2, Frame(0, 0, 0, 0, 0)
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xFF:  # fill byte
            at += 1
        elif 0xD0 <= kind <= 0xD7:  # RST has no length. TEM (01) has none either; PIL rejects it
            at += 2
        elif kind == 0xDA:
            return found._replace(scan=at + 2 + (data[at + 2] << 8 | data[at + 3]))
        elif kind in _FRAMES and not found.kind:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            found = Frame(height, width, data[at + 9], kind, 0)
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        elif kind in _SEGMENTS:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        else:
            break
    return Frame(0, 0, 0, 0, 0)


def is_plain_scan(data: bytes | memoryview, frame: Frame) -> bool:
    """Whether a JPEG is one Huffman-coded scan without markers except restarts: then no data after a box can make the full
    decode fail. 25 us. Progressive JPEGs gain little (7 %): all their scans are read for any box."""
    if frame.kind not in (0xC0, 0xC1) or not 0 < frame.scan <= len(data) - 2 or data[-2:] != b"\xff\xd9":
        return False
    scan = np.frombuffer(data, dtype=np.uint8, offset=frame.scan)
    marked = (scan[:-1] == 0xFF) & (scan[1:] != 0)
    if np.count_nonzero(marked) == 1:
        return True
    kinds = scan[1:][marked]
    return bool(((kinds[:-1] & 0xF8) == 0xD0).all())


def as_tensor(image: PIL.Image.Image | np.ndarray) -> Tensor:
    """RGB image, or (H, W, 3) uint8 -> (3, H, W) uint8, channels last in memory; an array's memory is shared."""
    return torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image)).permute(2, 0, 1)
