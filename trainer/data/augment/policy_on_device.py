"""Colour and shape policies on a batch on the device: what PIL computes for one image, for every row its own operation.

A layer runs every stage over all rows; a row's stages but one leave it unchanged to the bit: a table of 256 levels per channel
(brightness, contrast, posterize, solarize, invert, autocontrast, equalize), a blend with the grey or the smoothed image, a blur, and
one affine warp (rotation, shear, translation). So shapes are fixed, nothing is read by the host, and a layer compiles to few kernels.
Each operation is within one grey level of PIL's; arithmetic is PIL's own wherever it is exact.

Letters: b rows of a micro-batch, S side of an image, L layers.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from trainer.config.schema import AugmentConfig
from trainer.data.augment.policy_draws import Code, PolicyDraws

_TABLES = frozenset({Code.BRIGHTNESS, Code.CONTRAST, Code.POSTERIZE, Code.SOLARIZE, Code.SOLARIZE_ADD, Code.INVERT,
                     Code.AUTOCONTRAST, Code.EQUALIZE})  # fmt: skip
_WARPS = frozenset({Code.ROTATE, Code.SHEAR_X, Code.SHEAR_Y, Code.MOVE_X, Code.MOVE_Y})
_LIFT = 2.0**-12  # as in `shear`: flat areas would be truncated to the level below
_REACH = 2  # pixels of a box blur to each side: enough for a standard deviation of 2
_ONE = 1 << 24  # sum of the weights of a box blur, as in PIL

Codes = tuple[frozenset[Code], ...]
"""The operations that may occur in each layer: what cannot occur is not computed."""


def codes_of(augment: AugmentConfig) -> Codes:
    """The operations that the policy may draw for the device; empty if the workers compute it."""
    return _codes(augment.policy, augment.color_jitter) if augment.policy_on == "device" else ()


@lru_cache(maxsize=8)
def _codes(policy: str, color_jitter: float) -> Codes:
    return PolicyDraws(AugmentConfig(policy=policy, color_jitter=color_jitter), 32).codes


def apply_policy(images: Tensor, steps: Tensor, codes: Codes, augment: AugmentConfig) -> Tensor:
    """images: (b, 3, S, S) uint8; steps: (b, L, 2) float64, see `PolicyDraws`; codes: of L layers. The same shape and type."""
    for layer, possible in enumerate(codes):
        images = _layer(images, steps[:, layer, 0].to(torch.int64), steps[:, layer, 1], possible, augment)
    return images


def _layer(images: Tensor, code: Tensor, value: Tensor, codes: frozenset[Code], augment: AugmentConfig) -> Tensor:
    if codes & _TABLES:
        table = tables(images, code, value, codes)
        images = table.gather(2, images.flatten(2).long()).view(images.shape)
    for kind, other in ((Code.COLOUR, _grey), (Code.SHARPNESS, _smoothed)):
        if kind in codes:
            factor = _of(kind, code, value, 1.0).float()[:, None, None, None]
            images = _blend(other(images).float(), images.float(), factor)
    if Code.BLUR in codes:
        images = _blurred(images, _of(Code.BLUR, code, value, 0.0))
    if codes & _WARPS:
        images = _warped(images, _matrices(code, value, images.shape[-1]), augment)
    return images


def _of(kind: Code, code: Tensor, value: Tensor, other: float) -> Tensor:
    """The values of the rows with this operation, `other` in the others."""
    return torch.where(code == kind.value, value, other)


def _blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    """PIL's `blend`: truncated to uint8."""
    return (first + factor * (second - first)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """PIL's conversion to L: (b, 1, S, S) int32."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[:, None]


def _smoothed(images: Tensor) -> Tensor:
    """See `policy.smoothed`."""
    wide = images.to(torch.int32)
    sums = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    sums = sums[..., :-2] + sums[..., 1:-1] + sums[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    found = wide.clone()
    found[:, :, 1:-1, 1:-1] = (2 * sums + 13) // 26
    return found


def tables(images: Tensor, code: Tensor, value: Tensor, codes: frozenset[Code]) -> Tensor:
    """The new level of every level in each channel, (b, 3, 256) uint8; rows of other operations keep theirs."""
    levels = torch.arange(256, device=images.device)
    wide, factor = levels.float(), value.float()[:, None]
    found: dict[Code, Tensor] = {Code.INVERT: (255 - levels).expand(len(code), 256)}
    found[Code.BRIGHTNESS] = _blend(torch.zeros_like(wide), wide, factor)
    bits = _of(Code.POSTERIZE, code, value, 8.0)[:, None]
    step = torch.exp2(8 - bits).to(torch.int64)  # of 0 bits: one step over all levels
    found[Code.POSTERIZE] = levels // step * step
    found[Code.SOLARIZE] = torch.where(levels < value[:, None], levels, 255 - levels)
    found[Code.SOLARIZE_ADD] = torch.where(levels < 128, (levels + value[:, None].to(torch.int64)).clamp(max=255), levels)
    if Code.CONTRAST in codes:
        mean = (_grey(images).flatten(1).sum(1, dtype=torch.int64).double() / images[0, 0].numel() + 0.5).floor().float()
        found[Code.CONTRAST] = _blend(mean[:, None], wide, factor)
    each = {kind: table[:, None] for kind, table in found.items()}
    if codes & {Code.AUTOCONTRAST, Code.EQUALIZE}:
        low, high = images.amin((2, 3)).long()[..., None], images.amax((2, 3)).long()[..., None]
        each[Code.AUTOCONTRAST] = _stretched(levels, low, high)
        if Code.EQUALIZE in codes:
            each[Code.EQUALIZE] = _equal(levels, images, high)
    table = levels.expand(len(code), 3, 256)
    for kind in sorted(codes & _TABLES):
        table = torch.where((code == kind.value)[:, None, None], each[kind].long(), table)
    return table.to(torch.uint8)


def _stretched(levels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """PIL's autocontrast: low, high (b, 3, 1) of each channel -> (b, 3, 256)."""
    scale = 255.0 / (high - low).clamp(min=1).double()
    table = (levels * scale - low * scale).clamp(0, 255).to(torch.int64)
    return torch.where(high > low, table, levels)


def _equal(levels: Tensor, images: Tensor, high: Tensor) -> Tensor:
    """PIL's equalize: (b, 3, 256)."""
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts = counts.scatter_add(2, pixels, torch.ones_like(pixels, dtype=torch.int32)).long()
    step = (pixels.shape[2] - counts.gather(2, high)) // 255
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return torch.where(((counts > 0).sum(2, keepdim=True) > 1) & (step > 0), table, levels)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """PIL's Gaussian blur: three box blurs of fractional width along the rows, then along the columns, each rounded. sigma: (b,)."""
    square = sigma * sigma / 3
    whole = ((torch.sqrt(12.0 * square + 1.0) - 1.0) / 2.0).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * square) / (6 * (square - (whole + 1) ** 2))
    middle = (_ONE / ((whole + part) * 2 + 1)).to(torch.int64)
    edge = (_ONE - (2 * whole.long() + 1) * middle) // 2
    weights = []
    for away in range(-_REACH, _REACH + 1):
        near, next_ = whole >= abs(away), whole + 1 == abs(away)
        weights.append((torch.where(near, middle, torch.where(next_, edge, 0)) / _ONE).float()[:, None, None, None])
    side = images.shape[-1]
    places = torch.arange(side, device=images.device)
    for dim in (3, 3, 3, 2, 2, 2):
        taps = (images.index_select(dim, (places + away).clamp(0, side - 1)) for away in range(-_REACH, _REACH + 1))
        sums = torch.full((), 0.5, device=images.device)
        for weight, tap in zip(weights, taps, strict=True):
            sums = sums + weight * tap
        images = sums.to(torch.uint8)
    return images


def _matrices(code: Tensor, value: Tensor, size: int) -> tuple[Tensor, ...]:
    """Six numbers of the affine map from new to old places, (b, 1, 1) float64 each, as PIL's `transform` takes them."""
    turn = _of(Code.ROTATE, code, -value * (math.pi / 180), 0.0)
    cos, sin, half = torch.cos(turn), torch.sin(turn), size / 2
    right = _of(Code.MOVE_X, code, value, 0.0) + half - half * (cos + sin)
    down = _of(Code.MOVE_Y, code, value, 0.0) + half - half * (cos - sin)
    six = (cos, sin + _of(Code.SHEAR_X, code, value, 0.0), right, _of(Code.SHEAR_Y, code, value, 0.0) - sin, cos, down)
    return tuple(one[:, None, None] for one in six)


def _warped(images: Tensor, matrix: tuple[Tensor, ...], augment: AugmentConfig) -> Tensor:
    """PIL's `transform` with 4 x 4 taps: edges repeated, pixels from outside in the mean colour. Places in float64, so that a pixel on the
    border falls to the same side."""
    side = images.shape[-1]
    middles = torch.arange(side, device=images.device, dtype=torch.float64) + 0.5
    across, down = middles[None, None, :], middles[None, :, None]
    a, b, c, d, e, f = matrix
    x, y = a * across + b * down + c, d * across + e * down + f  # (b, S, S)
    inside = ((x >= 0) & (x < side) & (y >= 0) & (y < side))[:, None]
    columns, wide = _taps(x, side, augment.interpolation)
    rows, high = _taps(y, side, augment.interpolation)
    flat, sums = images.flatten(2), torch.full((), _LIFT, device=images.device)
    for row, weight in zip(rows, high, strict=True):
        line = torch.zeros((), device=images.device)
        for column, share in zip(columns, wide, strict=True):
            place = (row * side + column).flatten(1)[:, None].expand(-1, 3, -1)
            line = line + flat.gather(2, place).view(images.shape) * share
        sums = sums + line * weight
    fill = torch.stack([torch.full((), min(255, round(255 * mean)), device=images.device) for mean in augment.mean])
    return torch.where(inside, sums.clamp(0, 255).to(torch.uint8), fill.to(torch.uint8)[None, :, None, None])


def _taps(places: Tensor, side: int, interpolation: str) -> tuple[list[Tensor], list[Tensor]]:
    """The pixels around each place along one axis and their weights (b, 1, S, S): Keys' cubic with a = -1, or linear."""
    first = (places - 0.5).floor()
    d = (places - 0.5 - first).float()[:, None]
    d2, d3 = d * d, d * d * d
    cubic = [2 * d2 - d - d3, 1 - 2 * d2 + d3, d + d2 - d3, d3 - d2]
    linear = [1 - d, d]
    begin, weights = (-1, cubic) if interpolation == "bicubic" else (0, linear)
    return [(first.long() + begin + n).clamp(0, side - 1) for n in range(len(weights))], weights
