"""The only module that calls TurboJPEG: decodes the crop of a JPEG without the rest.

libjpeg-turbo 3 skips inverse transform and colour conversion outside a cropping region, and everything after its last row. The
pixels equal those of the whole image bit for bit; an image with any warning or error is left to the full decoder. The library is
searched on the system (Debian's libturbojpeg before 3 lacks cropping) and in the wheel `turbojpeg`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np

_DECOMPRESS, _RGB = 1, 0
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLOURS = 0, 4, 5, 6, 7, 8  # TJPARAM_...
_UNIT_WIDTH = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32}  # pixels of an iMCU by TJSAMP: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1
_COLOURED = (0, 1, 2)  # RGB, YCbCr, grey by TJCS


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


@lru_cache(maxsize=1)
def library() -> Any:
    """TurboJPEG >= 3 by ctypes, None if it is not installed. ctypes calls release the GIL."""
    for path in _places():
        try:
            found = ctypes.CDLL(path)
            found.tj3SetCroppingRegion.argtypes = [ctypes.c_void_p, _Region]
        except (OSError, AttributeError):
            continue
        found.tj3Init.restype = ctypes.c_void_p
        found.tj3Init.argtypes = [ctypes.c_int]
        found.tj3Destroy.argtypes = [ctypes.c_void_p]
        found.tj3Set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        found.tj3Get.argtypes = [ctypes.c_void_p, ctypes.c_int]
        source = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        found.tj3DecompressHeader.argtypes = source
        found.tj3Decompress8.argtypes = [*source, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        return found
    return None


def _places() -> list[str]:
    try:
        files = metadata.files("turbojpeg") or []
    except metadata.PackageNotFoundError:
        files = []
    bundled = [str(file.locate()) for file in files if file.name.startswith("libturbojpeg")]
    return [path for path in (ctypes.util.find_library("turbojpeg"), *bundled) if path]


def cut(data: bytes | memoryview, box: tuple[int, int, int, int], size: tuple[int, int] | None = None) -> np.ndarray | None:
    """The pixels in box (top, left, height, width) of a JPEG, (height, width, 3) uint8: those of the whole image, bit for bit.
    size: (height, width) that the JPEG must have.

    None without the library, or if TurboJPEG fails or warns: then PIL decodes the whole image. Data after the box's last row
    is not read, see `decode.EncodedImage`.
    """
    turbo = library()
    if turbo is None:
        return None
    # a decompressor per image, 2 us: a used one has the tables of the image before, and gives an image without any those
    handle = turbo.tj3Init(_DECOMPRESS)
    if not handle:
        raise MemoryError("TurboJPEG: no memory for a decompressor")
    try:
        turbo.tj3Set(handle, _STOP_ON_WARNING, 1)
        return _cut(turbo, handle, np.frombuffer(data, dtype=np.uint8), size, *box)
    finally:
        turbo.tj3Destroy(handle)


def _cut(
    turbo: Any, handle: Any, data: np.ndarray, size: tuple[int, int] | None, top: int, left: int, height: int, width: int
) -> np.ndarray | None:
    source = handle, data.ctypes.data, data.size
    if turbo.tj3DecompressHeader(*source):
        return None
    unit = _UNIT_WIDTH.get(turbo.tj3Get(handle, _SUBSAMPLING))
    whole_width, whole_height = turbo.tj3Get(handle, _WIDTH), turbo.tj3Get(handle, _HEIGHT)
    known = turbo.tj3Get(handle, _PRECISION) == 8 and turbo.tj3Get(handle, _COLOURS) in _COLOURED
    inside = 0 < height <= whole_height - top and 0 < width <= whole_width - left  # TurboJPEG takes 0 as the rest of the image
    if unit is None or not known or not inside or size not in (None, (whole_height, whole_width)):
        return None
    # a region begins at an iMCU border; smooth chroma upsampling reads one sample to each side, and is switched off where
    # there are fewer than two samples
    last = min(whole_width, max(left + width + 1, unit))
    first = max(0, min(left - 1, last - unit)) // unit * unit
    if turbo.tj3SetCroppingRegion(handle, _Region(first, top, last - first, height)):
        return None
    pixels = np.empty((height, last - first, 3), dtype=np.uint8)
    if turbo.tj3Decompress8(*source, pixels.ctypes.data, 0, _RGB):
        return None
    return pixels[:, left - first : left - first + width]
