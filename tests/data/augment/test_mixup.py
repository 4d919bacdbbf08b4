"""Mixup and cutmix against timm's own: the same draws from the same random numbers, the same images, the same targets."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target

from trainer.config.schema import AugmentConfig
from trainer.data.augment.mixup import NO_MIX, Mix, draw_mix, mix_images, mix_targets, partners, sample, shares
from trainer.preflight.timm_recipe import LegacyGenerator

RECIPES = [
    AugmentConfig(mixup=0.8, cutmix=1.0),
    AugmentConfig(mixup=0.8),
    AugmentConfig(cutmix=1.0, mix_probability=0.7),
    AugmentConfig(mixup=0.2, cutmix=0.5, mix_probability=0.5, mix_switch=0.3),
]


def from_timm(augment, seed, size):
    """What timm's Mixup draws after np.random.seed(seed): (lam, box)."""
    before = np.random.get_state()
    np.random.seed(seed)
    mixup = Mixup(augment.mixup, augment.cutmix, prob=augment.mix_probability, switch_prob=augment.mix_switch)
    lam, cut = mixup._params_per_batch()
    box = None
    if cut and lam != 1.0:
        (top, bottom, left, right), lam = cutmix_bbox_and_lam((2, 3, size, size), lam)
        box = (int(top), int(bottom), int(left), int(right))
    np.random.set_state(before)
    return Mix(float(lam), box)


def flip_order(b):
    """The order in which neighbours become timm's flip partners: position i holds 2i, position b-1-i holds 2i+1."""
    return torch.tensor([*range(0, b, 2), *range(b - 1, 0, -2)])


@pytest.mark.parametrize("augment", RECIPES)
@pytest.mark.parametrize("size", [32, 37])
def test_draws_are_timms_from_the_same_random_numbers(augment, size):
    kinds = set()
    for seed in range(300):
        ours = sample(augment, LegacyGenerator(np.random.RandomState(seed)), size)
        assert ours == from_timm(augment, seed, size)
        kinds.add("none" if ours is NO_MIX else "mixup" if ours.box is None else "cutmix")
    off = {"mixup": augment.mixup == 0, "cutmix": augment.cutmix == 0, "none": augment.mix_probability == 1}
    assert kinds == {kind for kind, absent in off.items() if not absent}


def test_draws_are_keyed_by_seed_and_step_and_touch_no_global_generator():
    augment, before = RECIPES[0], np.random.get_state()[1].copy()
    draws = {(seed, step): draw_mix(augment, seed, step, 64) for seed in range(3) for step in range(200)}
    assert all(draw_mix(augment, *key, 64) == mix for key, mix in draws.items())
    assert len(set(draws.values())) == len(draws)
    assert (np.random.get_state()[1] == before).all()
    cut = np.mean([mix.box is not None for mix in draws.values()])
    assert abs(cut - augment.mix_switch) < 0.07


def test_off_is_the_identity():
    assert draw_mix(AugmentConfig(), 0, 5, 32) is NO_MIX
    images = torch.rand(4, 3, 8, 8)
    assert mix_images(images, NO_MIX, torch.ones(4)) is images


@pytest.mark.parametrize("mix", [Mix(0.3), Mix(0.81), Mix(1 - 12 / 64, (2, 6, 5, 8)), Mix(1.0, (3, 3, 1, 4)), NO_MIX])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_and_targets_are_timms_on_the_paired_order(mix, smoothing):
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 3, 3, 3, 2, 1])
    order = flip_order(6)
    theirs = images[order].clone()
    if mix.box:
        top, bottom, left, right = mix.box
        theirs[:, :, top:bottom, left:right] = theirs.flip(0)[:, :, top:bottom, left:right]
    else:
        flipped = theirs.flip(0).mul_(1.0 - mix.lam)
        theirs.mul_(mix.lam).add_(flipped)
    weights = torch.ones(6)
    assert torch.equal(mix_images(images, mix, weights)[order], theirs)
    ours = mix_targets(labels, mix, weights, 5, smoothing)
    assert torch.equal(ours[order], mixup_target(labels[order], 5, mix.lam, smoothing))
    torch.testing.assert_close(ours.sum(1), torch.ones(6))


def test_pairs_do_not_depend_on_how_the_batch_is_cut():
    images, labels, weights = torch.rand(8, 3, 8, 8), torch.arange(8) % 5, torch.ones(8)
    weights[3] = 0
    for mix in (Mix(0.4), Mix(0.75, (0, 4, 0, 4))):
        whole = mix_images(images, mix, weights), mix_targets(labels, mix, weights, 5, 0.1)
        for start, stop in ((0, 2), (2, 8), (4, 6)):
            rows = slice(start, stop)
            assert torch.equal(mix_images(images[rows], mix, weights[rows]), whole[0][rows])
            assert torch.equal(mix_targets(labels[rows], mix, weights[rows], 5, 0.1), whole[1][rows])


@pytest.mark.parametrize("mix", [Mix(0.2), Mix(0.75, (0, 4, 0, 4))])
def test_the_partner_of_a_broken_image_stays_whole(mix):
    images = torch.rand(4, 3, 8, 8)
    images[0] = 0
    labels, weights = torch.tensor([-1, 2, 1, 4]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    mixed, targets = mix_images(images, mix, weights), mix_targets(labels, mix, weights, 5, 0.0)
    assert torch.equal(mixed[1], images[1])
    assert targets[1].tolist() == [0, 0, 1, 0, 0]
    assert not torch.equal(mixed[2], images[2])
    assert targets[2].tolist() == pytest.approx([0, mix.lam, 0, 0, 1 - mix.lam])
    own, other = shares(mix, weights)
    assert own.tolist() == pytest.approx([mix.lam, 1.0, mix.lam, mix.lam]) and other[1] == 0


def test_partners_are_neighbours():
    assert partners(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    with pytest.raises(RuntimeError):
        partners(torch.arange(5))
