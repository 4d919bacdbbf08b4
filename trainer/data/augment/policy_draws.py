"""The draws of a policy as numbers, for the device: which operation, and how strong; the same random numbers as in a worker process.

One row (code, value) per layer. A code stands for an operation of PIL with one number; timm's names that differ only in how the number
is drawn share one. AugMix has several chains of operations per image and is left to the workers.
"""

from __future__ import annotations

import random
from enum import IntEnum
from typing import Any

from timm.data import auto_augment as theirs

from trainer.config.errors import ConfigError
from trainer.config.schema import AugmentConfig
from trainer.data.augment.policy import drawn, jitter_drawn, layers_of, ops_of, parts_of


class Code(IntEnum):
    """An operation; the meaning of its value."""

    NOTHING = 0
    BRIGHTNESS = 1  # factor of PIL's ImageEnhance, 1 = unchanged; so for the next three
    CONTRAST = 2
    COLOUR = 3
    SHARPNESS = 4
    POSTERIZE = 5  # bits that stay
    SOLARIZE = 6  # levels from here on are inverted
    SOLARIZE_ADD = 7  # what levels below 128 get
    INVERT = 8
    AUTOCONTRAST = 9
    EQUALIZE = 10
    BLUR = 11  # standard deviation of a Gaussian, in pixels, at most 2
    ROTATE = 12  # degrees
    SHEAR_X = 13  # columns per row
    SHEAR_Y = 14
    MOVE_X = 15  # pixels
    MOVE_Y = 16


_NAMES = {
    "AutoContrast": Code.AUTOCONTRAST, "Equalize": Code.EQUALIZE, "Invert": Code.INVERT, "Rotate": Code.ROTATE,
    "Posterize": Code.POSTERIZE, "Solarize": Code.SOLARIZE, "SolarizeAdd": Code.SOLARIZE_ADD, "Color": Code.COLOUR,
    "Contrast": Code.CONTRAST, "Brightness": Code.BRIGHTNESS, "Sharpness": Code.SHARPNESS, "ShearX": Code.SHEAR_X,
    "ShearY": Code.SHEAR_Y, "TranslateX": Code.MOVE_X, "TranslateY": Code.MOVE_Y, "Desaturate": Code.COLOUR,
    "GaussianBlur": Code.BLUR, "GaussianBlurRand": Code.BLUR,
}  # fmt: skip
_JITTER = (Code.BRIGHTNESS, Code.CONTRAST, Code.COLOUR)


class PolicyDraws:
    """Call it with the generator of an example: its (code, value) rows, `layers` of them. codes: those that may occur in each layer."""

    def __init__(self, augment: AugmentConfig, size: int) -> None:
        self._transform, self._jitter = parts_of(augment, size)
        if isinstance(self._transform, theirs.AugMixAugment):
            raise ConfigError(
                f"augment.policy={augment.policy!r} with augment.policy_on=device: AugMix is computed in the workers only; set "
                "augment.policy_on=workers, or a RandAugment policy, e.g. 'rand-m9-mstd0.5-inc1'"
            )
        self._size = size
        ops = [] if self._transform is None else ops_of(self._transform)
        self.codes = (frozenset(code_of(op) for op in ops),) * layers_of(self._transform)
        self.codes += (frozenset(_JITTER),) * (len(_JITTER) if self._jitter else 0)
        self.layers = len(self.codes)

    def __call__(self, rng: random.Random) -> list[tuple[int, float]]:
        found = [] if self._transform is None else [numbers(op, how, self._size) for op, how in drawn(self._transform, rng)]
        jitter = [(int(_JITTER[which]), factor) for which, factor in jitter_drawn(rng, self._jitter)]
        return [*found, *[(int(Code.NOTHING), 0.0)] * (self.layers - len(found) - len(jitter)), *jitter]


def code_of(op: Any) -> Code:
    """Of a timm operation."""
    name = op.name
    for ending in ("Increasing", "Original", "Rel"):
        name = name.removesuffix(ending)
    return _NAMES[name]


def numbers(op: Any, how: tuple[float, ...], size: int) -> tuple[int, float]:
    """Code and value of a timm operation with the magnitude of `policy.arguments`, on images of `size` pixels a side."""
    value = float(how[0]) if how else 0.0
    if op.name.endswith("Rel"):
        value *= size
    if op.name == "Desaturate":
        value = min(1.0, max(0.0, 1.0 - value))
    return int(code_of(op)), value
