"""Crop and antialiased resize of images of different sizes in one launch on the GPU: a Triton kernel.

Torch has no such operation: its antialiased resize takes images of one size, and on a GPU no uint8. The filter is that of torch's and
PIL's uint8 resize, `interpolate(antialias=True)`: cubic with a = -.5 or triangle, widened by the reduction, horizontal pass first,
rounded to uint8 after each pass. Torch's weights are integers of 16 bits, so results may differ: by one level at most in all cases tried.

Imported only where there is a GPU; Triton's interpreter runs it on a CPU for the tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = 8  # of a row of the table: output row, offset, height, width of the image; top, left, height, width of the crop
BLOCK = 256  # output pixels of a program


@triton.jit
def _weight(distance, CUBIC: tl.constexpr):
    """The filter at a distance in output pixels."""
    d = tl.abs(distance)
    if CUBIC:
        near = (1.5 * d - 2.5) * d * d + 1.0
        far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
        return tl.where(d < 1.0, near, tl.where(d < 2.0, far, 0.0))
    return tl.maximum(1.0 - d, 0.0)


@triton.jit
def _rounded(value):
    """To the nearest whole number in 0..255, as float32."""
    return tl.floor(tl.minimum(tl.maximum(value, 0.0), 255.0) + 0.5)


@triton.jit
def resize_kernel(images, table, out, SIZE: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """One block of output pixels of one image; see `resized_crops`."""
    row = table + tl.program_id(1) * FIELDS
    target, offset = tl.load(row), tl.load(row + 1)
    image_height, image_width = tl.load(row + 2), tl.load(row + 3)
    top, left, height, width = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE * SIZE
    reach = 2.0 if CUBIC else 1.0

    scale_y, scale_x = height.to(tl.float32) / SIZE, width.to(tl.float32) / SIZE
    wide_y, wide_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    centre_y, centre_x = (place // SIZE + 0.5) * scale_y, (place % SIZE + 0.5) * scale_x
    first_y = tl.maximum((centre_y - reach * wide_y + 0.5).to(tl.int32), 0)
    first_x = tl.maximum((centre_x - reach * wide_x + 0.5).to(tl.int32), 0)
    last_y = tl.minimum((centre_y + reach * wide_y + 0.5).to(tl.int32), height.to(tl.int32))
    last_x = tl.minimum((centre_x + reach * wide_x + 0.5).to(tl.int32), width.to(tl.int32))
    taps_y, taps_x = (2 * reach * wide_y).to(tl.int32) + 2, (2 * reach * wide_x).to(tl.int32) + 2

    plane = image_height * image_width
    total_x = tl.zeros([BLOCK], tl.float32)
    for i in range(taps_x):
        at_x = first_x + i
        total_x += tl.where(at_x < last_x, _weight((at_x - centre_x + 0.5) / wide_x, CUBIC), 0.0)
    total_y = tl.zeros([BLOCK], tl.float32)
    red, green, blue = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for j in range(taps_y):
        at_y = first_y + j
        there_y = inside & (at_y < last_y)
        weight_y = tl.where(there_y, _weight((at_y - centre_y + 0.5) / wide_y, CUBIC), 0.0)
        line = images + offset + (top + at_y) * image_width + left
        r, g, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(taps_x):
            at_x = first_x + i
            there = there_y & (at_x < last_x)
            weight_x = tl.where(there, _weight((at_x - centre_x + 0.5) / wide_x, CUBIC), 0.0)
            r += weight_x * tl.load(line + at_x, mask=there, other=0).to(tl.float32)
            g += weight_x * tl.load(line + plane + at_x, mask=there, other=0).to(tl.float32)
            b += weight_x * tl.load(line + 2 * plane + at_x, mask=there, other=0).to(tl.float32)
        total_y += weight_y
        red += weight_y * _rounded(r / total_x)
        green += weight_y * _rounded(g / total_x)
        blue += weight_y * _rounded(b / total_x)
    total_y = tl.where(inside, total_y, 1.0)
    pixel = out + (target * SIZE * SIZE + place) * 3
    tl.store(pixel, _rounded(red / total_y).to(tl.uint8), mask=inside)
    tl.store(pixel + 1, _rounded(green / total_y).to(tl.uint8), mask=inside)
    tl.store(pixel + 2, _rounded(blue / total_y).to(tl.uint8), mask=inside)


def resized_crops(images: Tensor, table: Tensor, out: Tensor, interpolation: str) -> None:
    """Fill rows of `out` with resized crops.

    images: (n,) uint8, pictures one behind the other, each (3, H, W). table: (k, 8) int64, see `FIELDS`; the output row of each is below b.
    out: (b, S, S, 3) uint8, contiguous. interpolation: bicubic or bilinear.
    """
    size = out.shape[1]
    grid = (triton.cdiv(size * size, BLOCK), len(table))
    with torch.cuda.device_of(out):
        launched: Any = resize_kernel[grid]
        launched(images, table, out, SIZE=size, CUBIC=interpolation == "bicubic", BLOCK=BLOCK, FIELDS=FIELDS)
