"""Flip, normalisation and erasing on the device against timm's, and keyed by the example alone."""

import random

import numpy as np
import pytest
import torch
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing

from trainer.config.schema import AugmentConfig
from trainer.data.augment.on_device import augment_on_device, erase, noise, normalise
from trainer.data.augment.transform import _erase
from trainer.data.batch import Batch


def batch(b=4, size=16, flip=False, boxes=None, rng_keys=None) -> Batch:
    long = torch.zeros(b, dtype=torch.int64)
    return Batch(
        images=torch.randint(0, 256, (b, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(b)),
        labels=long,
        ids=torch.arange(b),
        copies=long,
        weights=torch.ones(b),
        policy=torch.zeros(b, 0, 2),
        flip=torch.tensor(flip if isinstance(flip, list) else [flip] * b),
        erase=torch.tensor(boxes or [[0, 0, 0, 0]] * b, dtype=torch.int32),
        jpeg=torch.zeros(b, 0, dtype=torch.int32),
        rng_keys=torch.tensor(rng_keys or list(range(100, 100 + b))),
        broken=[],
    )


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 0.125))])
def test_normalisation_is_timms_to_the_bit(augment):
    images = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    loader = PrefetchLoader([(images, torch.zeros(4))], mean=augment.mean, std=augment.std, device=torch.device("cpu"))
    ((theirs, _),) = loader
    ours = normalise(images, augment)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_only_the_drawn_rows_are_flipped_and_the_batch_is_left_as_it_was():
    rows = batch(flip=[True, False, False, True])
    before, augment = rows.images.clone(), AugmentConfig(flip=0.5)
    images = augment_on_device(rows, augment)
    plain = normalise(rows.images, augment)
    assert torch.equal(images[[0, 3]], plain[[0, 3]].flip(-1)) and torch.equal(images[[1, 2]], plain[[1, 2]])
    assert torch.equal(rows.images, before)


def test_erasing_fills_the_box_and_nothing_else_after_the_flip():
    boxes = [[0, 0, 0, 0], [2, 3, 5, 4], [0, 0, 15, 15], [10, 12, 6, 4]]
    rows, augment = batch(flip=True, boxes=boxes), AugmentConfig(erasing=0.25)
    images, plain = augment_on_device(rows, augment), normalise(rows.images.flip(-1), augment)
    for image, before, (top, left, height, width) in zip(images, plain, boxes, strict=True):
        inside = torch.zeros(3, 16, 16, dtype=torch.bool)
        inside[:, top : top + height, left : left + width] = True
        assert torch.equal(image[~inside], before[~inside])
        assert not (image[inside] == before[inside]).any()
    assert torch.equal(augment_on_device(rows, AugmentConfig(erasing=0.0)), plain)


def test_the_noise_is_standard_normal_per_pixel_as_timms():
    ours = noise(torch.arange(1000), (3, 8, 8))
    theirs = RandomErasing(1.0, mode="pixel", device="cpu", min_area=0.98, max_area=0.99, min_aspect=1)
    assert theirs.per_pixel  # torch's normal_ per pixel and channel
    assert abs(float(ours.mean())) < 0.01 and abs(float(ours.std()) - 1) < 0.01
    assert abs(float((ours**4).mean()) - 3) < 0.1  # no tails cut off
    flat = ours.flatten(1)
    assert abs(float((flat[:, 1:] * flat[:, :-1]).mean())) < 0.01  # neighbouring pixels
    assert abs(float((flat[:, :64] * flat[:, 64:128]).mean())) < 0.01  # channels
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 0.01  # images
    assert len(torch.unique(flat[:, 0])) > 990


def test_an_image_gets_the_same_noise_in_any_batch():
    rows = batch(6, boxes=[[1, 1, 9, 9]] * 6, rng_keys=[5, -3, 2**62, 8, -(2**62), 0])
    whole = erase(rows.images.float(), rows.erase, rows.rng_keys)
    for some in ([0, 1], [4, 5, 2], [3]):
        assert torch.equal(erase(rows.images[some].float(), rows.erase[some], rows.rng_keys[some]), whole[some])


@pytest.mark.parametrize("size", [32, 224])
def test_boxes_are_timms_from_the_same_random_numbers(size):
    """The box is drawn in `augment`, where the example is decoded; from one random number generator both find the same."""
    theirs, state = RandomErasing(1.0, mode="pixel", device="cpu"), random.getstate()
    areas = []
    for seed in range(100):
        random.seed(seed)
        erased = theirs(torch.zeros(3, size, size)).abs().sum(0) > 0
        where = erased.nonzero()
        (top, left), (bottom, right) = where.amin(0).tolist(), where.amax(0).tolist()
        rng = random.Random(seed)
        rng.random()  # timm's throw for the probability
        assert _erase(rng, size) == (top, left, bottom - top + 1, right - left + 1)
        areas.append(len(where) / size**2)
    random.setstate(state)
    assert np.min(areas) > 0.02 * 0.8 and np.max(areas) < 1 / 3 * 1.1
