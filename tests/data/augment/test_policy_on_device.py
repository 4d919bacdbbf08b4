"""Policies on the device: the draws of the workers, within one grey level of PIL per operation, other rows unchanged to the bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from tests.support.images import picture
from trainer.config.errors import ConfigError
from trainer.config.schema import AugmentConfig
from trainer.data.augment import policy, policy_draws
from trainer.data.augment.policy_draws import Code, PolicyDraws
from trainer.data.augment.policy_on_device import apply_policy, codes_of

SIZE = 48
EVERY = (frozenset(Code),)
TEXTS = ("rand-m9-mstd0.5-inc1", "rand-m7-n3", "rand-m9-mstd101-inc1-tweights", "v0", "original", "originalr-mstd0.5", "3a")


def device(text: str = "none", **more: Any) -> AugmentConfig:
    return AugmentConfig(policy=text, policy_on="device", **more)


def pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def images() -> list[PIL.Image.Image]:
    """Pictures, noise, few levels, one level, black and white."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (SIZE, SIZE, 3)), rng.integers(90, 96, (SIZE, SIZE, 3)), np.full((SIZE, SIZE, 3), 77),
              255 * rng.integers(0, 2, (SIZE, SIZE, 3))]  # fmt: skip
    return [picture(0, SIZE, SIZE), picture(1, SIZE, SIZE), *(PIL.Image.fromarray(one.astype(np.uint8)) for one in arrays)]


def one_step(given: list[PIL.Image.Image], code: int, value: float, augment: AugmentConfig) -> Tensor:
    steps = torch.tensor([[[float(code), value]]] * len(given), dtype=torch.float64)
    return apply_policy(torch.stack([pixels(image) for image in given]), steps, EVERY, augment)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("text", TEXTS)
def test_every_operation_is_pils_to_one_level(text: str, interpolation: Any) -> None:
    augment = device(text, interpolation=interpolation)
    ops = {op.name: op for op in policy.ops_of(policy.parts_of(augment, SIZE)[0])}
    differ = {}
    for number, op in enumerate(ops.values()):
        rng, given = random.Random(number), images()
        for _ in range(3):
            how = policy.arguments(op, rng)
            found = one_step(given, *policy_draws.numbers(op, how, SIZE), augment)
            theirs = torch.stack([pixels(policy.applied(op, image, *how)) for image in given])
            error = (found.int() - theirs.int()).abs()
            assert error.max() <= 1, (op.name, how, int(error.max()), error.flatten(1).amax(1).tolist())
            differ[op.name] = max(differ.get(op.name, 0.0), float((error > 0).float().mean()))
    print(text, {name: f"{share:.2%}" for name, share in differ.items() if share})
    assert max(differ.values()) < 0.02, "shares of values that differ at all"


@pytest.mark.parametrize(
    "code", [Code.SHEAR_X, Code.MOVE_Y, Code.ROTATE, Code.BLUR, Code.EQUALIZE, Code.SHARPNESS, Code.POSTERIZE]
)
def test_an_operation_leaves_other_rows_as_they_are(code: Code) -> None:
    batch = torch.stack([pixels(image) for image in images()])
    for other in (Code.NOTHING, Code.INVERT):
        steps = torch.zeros(len(batch), 1, 2, dtype=torch.float64)
        steps[:, 0, 0] = other
        steps[1, 0] = torch.tensor([code, 2.0])
        found = apply_policy(batch, steps, EVERY, device())
        expected = batch if other is Code.NOTHING else 255 - batch
        assert torch.equal(found[0], expected[0]) and torch.equal(found[2:], expected[2:])
        assert not torch.equal(found[1], batch[1])


@pytest.mark.parametrize(
    "augment",
    [AugmentConfig(policy=text) for text in TEXTS] + [AugmentConfig(policy="three_augment", color_jitter=0.3)],
    ids=str,
)
def test_the_draws_are_those_of_the_workers(augment: AugmentConfig) -> None:
    """The generator of an example is left in the same state, and the operations of a layer change the same pixels."""
    draws, worker = PolicyDraws(augment.model_copy(update={"policy_on": "device"}), SIZE), policy.policy_of(augment, SIZE)
    assert worker is not None
    for seed in range(40):
        mine, theirs = random.Random(seed), random.Random(seed)
        steps = draws(mine)
        image = np.array(picture(seed % 3, SIZE, SIZE))
        done = worker(image, theirs)
        assert mine.getstate() == theirs.getstate()
        assert len(steps) == draws.layers and all(code in {*may, 0} for (code, _), may in zip(steps, draws.codes, strict=True))
        rows = torch.tensor([steps], dtype=torch.float64)
        found = apply_policy(pixels(image)[None], rows, draws.codes, augment)[0].int()
        error = (found - pixels(done).int()).abs()
        assert error.float().mean() < 2, "levels; an operation that follows another may widen one level to a few"
        assert (error <= 1).float().mean() > 0.85, (steps, float((error <= 1).float().mean()))


def test_jitter_alone_is_three_layers_in_random_order() -> None:
    draws = PolicyDraws(device(color_jitter=0.4), SIZE)
    found = [draws(random.Random(seed)) for seed in range(20)]
    assert draws.codes == (frozenset({Code.BRIGHTNESS, Code.CONTRAST, Code.COLOUR}),) * draws.layers and draws.layers == 3
    assert len({tuple(code for code, _ in steps) for steps in found}) > 3
    assert all(0.6 <= factor <= 1.4 for steps in found for _, factor in steps)


def test_augmix_is_left_to_the_workers() -> None:
    message = r"augment.policy='augmix-m3-w3' with augment.policy_on=device: .* set augment.policy_on=workers"
    with pytest.raises(ConfigError, match=message):
        PolicyDraws(device("augmix-m3-w3"), SIZE)


def test_in_the_workers_nothing_is_left_for_the_device() -> None:
    assert codes_of(AugmentConfig(policy="rand-m9-mstd0.5-inc1")) == ()
    assert all(Code.SHEAR_X in layer for layer in codes_of(device("rand-m9-mstd0.5-inc1")))
    assert codes_of(device("3a")) == (frozenset({Code.SOLARIZE, Code.COLOUR, Code.BLUR}),)
