"""Policies: timm's operations, strengths and frequencies, drawn from the example's own generator; fast paths against PIL's pixels."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from tests.support.images import picture
from trainer.config.schema import AugmentConfig
from trainer.data.augment import policy
from trainer.data.augment.shear import sheared

FILL = (124, 116, 104)
TEXTS = ("rand-m9-mstd0.5-inc1", "rand-m7-n3", "rand-m9-mstd101-inc1-tweights", "v0", "originalr-mstd0.5", "3a")


def built(text: str) -> Any:
    return policy._built(text, AugmentConfig(), 48)


@pytest.mark.parametrize("size", [(48, 40), (224, 224), (5, 3)])
def test_shear_and_translation_are_pils_but_for_rounding(size: tuple[int, int]) -> None:
    rng, worst, other, count = np.random.default_rng(0), 0, 0, 0
    for seed in range(4):
        image = picture(seed, *size)
        moves = [(rng.uniform(-0.4, 0.4), 0.0), (0.0, rng.uniform(-60, 60)), (0.0, 7.0), (0.0, 0.0), (0.3, 500.0), (-1.5, 20.0)]
        for factor, offset in moves:
            theirs = image.transform(
                size, PIL.Image.Transform.AFFINE, (1, factor, offset, 0, 1, 0), PIL.Image.Resampling.BICUBIC, fillcolor=FILL
            )
            error = np.abs(sheared(np.array(image), factor, offset, FILL).astype(int) - np.array(theirs))
            worst, other, count = max(worst, int(error.max())), other + int((error > 0).sum()), count + error.size
    print(f"shear and translation against PIL: largest {worst} of 255, {other} of {count} values differ")
    assert worst <= 1 and other < 0.01 * count


def test_smoothing_is_pils() -> None:
    for seed, size in enumerate([(48, 40), (31, 3), (3, 3), (2, 2)]):
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        assert np.array_equal(policy.smoothed(pixels), PIL.Image.fromarray(pixels).filter(PIL.ImageFilter.SMOOTH))


@pytest.mark.parametrize("text", TEXTS)
def test_every_operation_is_timms(text: str) -> None:
    for number, op in enumerate(policy.ops_of(built(text))):
        image, rng = picture(number, 48, 48), random.Random(number)
        for _ in range(3):
            how = policy.arguments(op, rng)
            if op.name == "GaussianBlurRand":  # timm draws inside the operation
                theirs = policy.theirs.gaussian_blur(image, *how)
            else:
                theirs = op.aug_fn(image, *how, **op.kwargs)
            for given in (image, np.array(image)):
                error = np.abs(np.asarray(policy.applied(op, given, *how)).astype(int) - np.asarray(theirs))
                assert error.max() <= 1 and error.mean() < 0.02, (op.name, how)


@pytest.mark.parametrize("text", TEXTS)
def test_strengths_and_choices_are_distributed_as_timms(text: str) -> None:
    """timm's own operations, run with their effect replaced by a record of their arguments."""
    transform, state, numpys = built(text), random.getstate(), np.random.get_state()
    ours: dict[str, list[float]] = {}
    for seed in range(3000):
        rng = random.Random(seed)
        for op in policy._chosen(transform, rng):
            if op.prob >= 1 or rng.random() <= op.prob:
                ours.setdefault(op.name, []).append((*policy.arguments(op, rng), 0.0)[0])
    noted: dict[str, list[float]] = {}
    for op in policy.ops_of(transform):
        op.aug_fn = lambda image, *how, name=op.name, **_: noted.setdefault(name, []).append((*how, 0.0)[0]) or image
    random.seed(1), np.random.seed(1)
    for _ in range(3000):
        transform(None)
    random.setstate(state), np.random.set_state(numpys)
    assert ours.keys() == noted.keys()
    for name, found in noted.items():
        assert abs(len(ours[name]) - len(found)) < 6 * (len(found) + 20) ** 0.5, name
        if name == "GaussianBlurRand" or len(found) < 100:
            continue
        a, b = np.array(ours[name], dtype=float), np.array(found, dtype=float)
        scale = max(b.std(), 1e-9)
        assert abs(a.mean() - b.mean()) < 6 * scale * (1 / len(a) + 1 / len(b)) ** 0.5 + 1e-9, name
        assert abs(a.std() - b.std()) < 0.2 * scale + 1e-6, name
        assert abs(a.min() - b.min()) <= scale + 1e-6 and abs(a.max() - b.max()) <= scale + 1e-6, name
    assert Counter({n: len(v) for n, v in ours.items()}).total() > 1000


def test_more_weighted_layers_than_operations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"more layers than operations"):
        policy.policy_of(AugmentConfig(policy="rand-m9-n40-tweights"), 32)
