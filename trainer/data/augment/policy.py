"""Colour and shape policies on the cropped image: RandAugment (Cubuk et al. 2020), AutoAugment, 3-Augment (Touvron et al. 2022), AugMix.

Operations, magnitudes and probabilities are timm's, read from the transform that timm builds from its config string; random
numbers come from the example's own generator. Shear, translation and sharpening compute PIL's pixels faster (see `shear`); the
other operations are PIL's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageEnhance
from timm.data import auto_augment as theirs
from timm.data.transforms import str_to_pil_interp
from torchvision.transforms.v2 import functional as F

from trainer.config.errors import ConfigError
from trainer.config.schema import AugmentConfig
from trainer.data.augment.shear import sheared

Pixels = np.ndarray | PIL.Image.Image  # (S, S, 3) uint8, or PIL's: operations accept both
Policy = Callable[[np.ndarray, random.Random], Pixels]

_TRANSPOSE = PIL.Image.Transpose.TRANSPOSE
_LEVELS = 10.0  # timm's magnitudes are tenths
_ENHANCED = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
_BLUR = (0.1, 2.0)  # radius of 3-Augment's blur


def policy_of(augment: AugmentConfig, size: int) -> Policy | None:
    """The policy of `augment.policy` and `augment.color_jitter`, None if both are off. Raises ConfigError for a policy unknown to timm."""
    transform, strength = parts_of(augment, size)
    if transform is None:
        return partial(jittered, strength=strength) if strength else None
    if isinstance(transform, theirs.AugMixAugment):
        return partial(_mixed, transform)
    return partial(_applied_and_jittered, transform, strength)  # no lambda: worker processes may get it pickled


def parts_of(augment: AugmentConfig, size: int) -> tuple[Any, float]:
    """timm's policy, or None, and the strength of the colour jitter behind it: as in timm, RandAugment, AutoAugment and AugMix switch it
    off. Raises ConfigError for a policy unknown to timm."""
    if augment.policy == "none":
        return None, augment.color_jitter
    text = "3a" if augment.policy == "three_augment" else augment.policy  # DeiT-III: grey, solarise or blur
    return _built(text, augment, size), augment.color_jitter if "3a" in text else 0.0


def _built(text: str, augment: AugmentConfig, size: int) -> Any:
    settings = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * m)) for m in augment.mean),
        "interpolation": str_to_pil_interp(augment.interpolation),
    }
    ignored = [part for part in text.split("-")[1:] if part[:1] != "t" and not any(map(str.isdigit, part))]
    try:
        assert not ignored, f"{', '.join(ignored)}: without a number, timm would ignore it"
        if text.startswith("rand"):
            transform: Any = theirs.rand_augment_transform(text, settings)
            possible = len(transform.ops) if transform.choice_weights is None else np.count_nonzero(transform.choice_weights)
            assert transform.choice_weights is None or transform.num_layers <= possible, "more layers than operations"
        elif text.startswith("augmix"):
            transform = theirs.augment_and_mix_transform(text, settings | {"translate_pct": 0.3})
        else:
            transform = theirs.auto_augment_transform(text, settings)
    except (AssertionError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"augment.policy={augment.policy!r}: unknown to timm ({error}); use 'none', 'three_augment' or a timm policy "
            "string, e.g. 'rand-m9-mstd0.5-inc1'"
        ) from None
    for op in ops_of(transform):
        if op.aug_fn is theirs.posterize:
            op.aug_fn = posterized
    return transform


def ops_of(transform: Any) -> list[Any]:
    """The operations of a timm policy."""
    if isinstance(transform, theirs.AutoAugment):
        return [op for chain in transform.policy for op in chain]
    return list(transform.ops)


def posterized(image: PIL.Image.Image, bits: int, **_: Any) -> PIL.Image.Image:
    """timm's top magnitude is 0 bits (DeiT's rand-m9-mstd0.5-inc1 at +2 sigma), a black image; Pillow 13 raises an error for it."""
    return theirs.posterize(image, bits) if bits > 0 else PIL.Image.new(image.mode, image.size)


def layers_of(transform: Any) -> int:
    """The most operations that one image gets; 0 without a policy."""
    if transform is None:
        return 0
    return max(map(len, transform.policy)) if isinstance(transform, theirs.AutoAugment) else transform.num_layers


def drawn(transform: Any, rng: random.Random) -> Iterator[tuple[Any, tuple[float, ...]]]:
    """The operations of one image in order, each with its `arguments`."""
    for op in _chosen(transform, rng):
        if op.prob >= 1.0 or rng.random() <= op.prob:
            yield op, arguments(op, rng)


def _applied_and_jittered(transform: Any, strength: float, image: Pixels, rng: random.Random) -> Pixels:
    return jittered(_applied(transform, image, rng), rng, strength)


def _applied(transform: Any, image: Pixels, rng: random.Random) -> Pixels:
    for op, how in drawn(transform, rng):
        image = applied(op, image, *how)
    return image


def _chosen(transform: Any, rng: random.Random) -> list[Any]:
    """The operations of one image; weighted ones are drawn without replacement, as in timm."""
    if isinstance(transform, theirs.AutoAugment):
        return rng.choice(transform.policy)
    if transform.choice_weights is None:
        return rng.choices(transform.ops, k=transform.num_layers)
    chosen: list[Any] = []
    while len(chosen) < transform.num_layers:
        one = rng.choices(transform.ops, transform.choice_weights)[0]
        if one not in chosen:
            chosen.append(one)
    return chosen


def arguments(op: Any, rng: random.Random) -> tuple[float, ...]:
    """The magnitude of a timm operation, drawn as in `AugmentOp` and its level functions."""
    level = op.magnitude
    if op.magnitude_std == float("inf"):
        level = rng.uniform(0, level)
    elif op.magnitude_std > 0:
        level = rng.gauss(level, op.magnitude_std)
    level = max(0.0, min(level, op.magnitude_max or _LEVELS))
    signed = level / _LEVELS if rng.random() > 0.5 else -level / _LEVELS
    match op.name:
        case "Rotate":
            return (30 * signed,)
        case "ShearX" | "ShearY":
            return (0.3 * signed,)
        case "TranslateX" | "TranslateY":
            return (op.hparams["translate_const"] * signed,)
        case "TranslateXRel" | "TranslateYRel":
            return (op.hparams.get("translate_pct", 0.45) * signed,)
        case name if name in _ENHANCED:
            return (max(0.1, 1 + 0.9 * signed),)
        case "GaussianBlurRand":
            return (rng.uniform(_BLUR[0], _BLUR[1] * level / _LEVELS),)
    return op.level_fn(level, op.hparams) if op.level_fn else ()  # the other operations draw nothing


def applied(op: Any, image: Pixels, *how: float) -> Pixels:
    """Apply a timm operation with the magnitude given by `arguments`."""
    bicubic, fill = op.kwargs["resample"] == PIL.Image.Resampling.BICUBIC, op.kwargs["fillcolor"]
    match op.name:
        case "ShearX" if bicubic:
            return sheared(_array(image), how[0], 0.0, fill)
        case "TranslateX" | "TranslateXRel" if bicubic:
            pixels = _array(image)
            return sheared(pixels, 0.0, how[0] * (pixels.shape[1] if op.name.endswith("Rel") else 1), fill)
        case "ShearY" if bicubic:
            return _down(image, how[0], 0.0, fill)
        case "TranslateY" | "TranslateYRel" if bicubic:
            image = _pil(image)
            return _down(image, 0.0, how[0] * (image.height if op.name.endswith("Rel") else 1), fill)
        case "Sharpness" | "SharpnessIncreasing":
            return PIL.Image.blend(PIL.Image.fromarray(smoothed(_array(image))), _pil(image), how[0])
        case "GaussianBlurRand":
            return theirs.gaussian_blur(_pil(image), how[0])
    return op.aug_fn(_pil(image), *how, **op.kwargs)


def _down(image: Pixels, factor: float, offset: float, fill: tuple[int, ...]) -> PIL.Image.Image:
    """`sheared` along the columns."""
    turned = np.asarray(_pil(image).transpose(_TRANSPOSE))
    return PIL.Image.fromarray(sheared(turned, factor, offset, fill)).transpose(_TRANSPOSE)


def smoothed(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: PIL's `ImageFilter.SMOOTH`, bit for bit: mean of 3 x 3 with weight 5 in the middle, the border unchanged."""
    wide = pixels.astype(np.uint16)
    sums = wide[:-2] + wide[1:-1] + wide[2:]
    sums = sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:] + 4 * wide[1:-1, 1:-1]
    found = pixels.copy()
    found[1:-1, 1:-1] = (2 * sums + 13) // 26
    return found


def _mixed(transform: Any, image: Pixels, rng: random.Random) -> Pixels:
    with _seeded(rng.getrandbits(32)):
        return transform(_pil(image))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """AugMix draws from the global `random` and numpy generators: seed them for one example, then restore them."""
    ours, numpys = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def jittered(image: Pixels, rng: random.Random, strength: float) -> Pixels:
    """torchvision's ColorJitter(s, s, s): brightness, contrast, saturation by 1 - s .. 1 + s, in random order."""
    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    for which, factor in jitter_drawn(rng, strength):
        image = steps[which](_pil(image), factor)  # pyright: ignore[reportArgumentType]
    return image


def jitter_drawn(rng: random.Random, strength: float) -> Iterator[tuple[int, float]]:
    """The steps of a colour jitter in order, 0 brightness, 1 contrast, 2 saturation, each with its factor; none without strength."""
    steps = [0, 1, 2]
    if strength:
        rng.shuffle(steps)
        for which in steps:
            yield which, rng.uniform(max(0.0, 1 - strength), 1 + strength)


def _pil(image: Pixels) -> PIL.Image.Image:
    return image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)


def _array(image: Pixels) -> np.ndarray:
    return image if isinstance(image, np.ndarray) else np.asarray(image)
