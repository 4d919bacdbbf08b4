"""The Batch of one rank: tensors of its rows of a global batch. Pixels do not depend on the number of ranks or workers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PADDING = -1  # id of a padding slot


class Batch(NamedTuple):
    """A rank's rows of a global batch, b slots. Padding slots come last: id -1, weight 0, black.

    images: (b, 3, S, S) uint8, channels last in memory. labels, ids, copies: (b,) int64. weights: (b,) float32, 0 = padding or broken
    image. policy: (b, L, 2) float64, the operations of a policy on the device (`PolicyDraws`), L = 0 without. flip: (b,) bool. erase:
    (b, 4) int32 top, left, height, width, height 0 = none. jpeg: (b, 0); with `data.decode_on: device`, until they are decoded, (b, 7)
    int64 (`device_jpeg.FIELDS`), and rows of images are (bytes,) uint8: a JPEG, or pixels (S, S, 3). rng_keys: (b,) int64 key of all
    random choices of a row. broken: (id, reason) of images that could not be decoded: they stay in their slot, black, with weight 0.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    copies: Tensor
    weights: Tensor
    policy: Tensor
    flip: Tensor
    erase: Tensor
    jpeg: Tensor
    rng_keys: Tensor
    broken: list[tuple[int, str]]
