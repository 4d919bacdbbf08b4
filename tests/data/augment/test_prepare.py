"""The graph of images and targets: the numbers of the single steps, few kernels on a GPU, and one graph for every mix."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from trainer.config.schema import AugmentConfig
from trainer.data.augment.mixup import NO_MIX, Mix, numbers
from trainer.data.augment.policy_draws import PolicyDraws
from trainer.data.augment.policy_on_device import codes_of
from trainer.data.augment.prepare import _eager, build_prepare, inputs, whole
from trainer.data.batch import Batch

MIXES = {
    "none": NO_MIX, "mixup": Mix(0.3), "more mixup": Mix(0.85), "cutmix": Mix(0.6, (2, 14, 5, 16)),
    "cutmix of nothing": Mix(1.0, (3, 3, 4, 4)),
}  # fmt: skip
AUGMENT = AugmentConfig(erasing=0.5, mixup=0.8, cutmix=1.0, smoothing=0.1)
CLASSES = 7


def batch(b: int = 8, size: int = 16) -> Batch:
    generator, ids = torch.Generator().manual_seed(b), torch.arange(b)
    pixels = torch.randint(0, 256, (b, size, size, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    weights = torch.ones(b)
    weights[3], weights[-1] = 0.0, 0.0  # broken; padding
    pixels[3] = pixels[-1] = 0
    labels = ids % CLASSES
    labels[-1] = -1
    boxes = torch.tensor([[0, 0, 0, 0], [1, 2, 9, 8]] * (b // 2), dtype=torch.int32)
    return Batch(
        images=pixels, labels=labels, ids=ids, copies=torch.zeros_like(ids), weights=weights,
        policy=torch.zeros(b, 0, 2), flip=ids % 3 == 0, erase=boxes, jpeg=torch.zeros(b, 0, dtype=torch.int32),
        rng_keys=ids * 104729, broken=[],
    )  # fmt: skip


def with_policy(rows: Batch, augment: AugmentConfig, seed: int) -> Batch:
    """Operations drawn for all but the last row, which is padding."""
    draws = PolicyDraws(augment, rows.images.shape[-1])
    steps = [draws(random.Random(100 * seed + n)) for n in range(len(rows.ids) - 1)]
    return rows._replace(policy=torch.tensor([*steps, [(0, 0.0)] * draws.layers], dtype=torch.float64))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("changes", [{}, {"erasing": 0.0, "flip": 0.0}, {"mixup": 0.0}, {"smoothing": 0.0}])
def test_images_and_targets_are_those_of_the_single_steps(mix: str, changes: dict[str, Any]) -> None:
    """To the bit for cutmix and without a mix; mixup to the last bit or two, as 1 - lam is taken of a float32."""
    augment, rows = AUGMENT.model_copy(update=changes), batch()
    expected = _eager(augment, CLASSES, rows, MIXES[mix])
    found = whole(augment, CLASSES, (), *inputs(rows, augment, numbers(MIXES[mix])))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    if mix != "mixup" and mix != "more mixup":
        assert torch.equal(found[0], expected[0])


def test_without_mixing_in_the_settings_nothing_is_blended() -> None:
    augment = AUGMENT.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
    found = whole(augment, CLASSES, (), *inputs(batch(), augment, numbers(NO_MIX)))
    for mine, theirs in zip(found, _eager(augment, CLASSES, batch(), NO_MIX), strict=True):
        assert torch.equal(mine, theirs)


def test_one_graph_serves_every_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compiler(function, backend=counter, **settings))
    torch.compiler.reset()
    prepare = build_prepare(AUGMENT, CLASSES, compiled=True)
    for mix in MIXES.values():
        images, targets = prepare(batch(), mix)
        expected = _eager(AUGMENT, CLASSES, batch(), mix)
        torch.testing.assert_close((images, targets), expected, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "three_augment"])
def test_a_policy_on_the_device_is_in_the_graph(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compiler(function, backend=counter, **settings))
    torch.compiler.reset()
    augment = AUGMENT.model_copy(update={"policy": text, "policy_on": "device", "color_jitter": 0.3})
    prepare = build_prepare(augment, CLASSES, compiled=True)
    for seed in range(3):
        rows = with_policy(batch(), augment, seed)
        mine, theirs = prepare(rows, MIXES["cutmix"]), _eager(augment, CLASSES, rows, MIXES["cutmix"])
        assert torch.equal(mine[0], theirs[0])
        plain = _eager(AUGMENT, CLASSES, rows, MIXES["cutmix"])
        assert not torch.equal(mine[0], plain[0])
        rows = rows._replace(flip=torch.zeros(8, dtype=torch.bool), erase=torch.zeros(8, 4, dtype=torch.int32))
        assert torch.equal(_eager(augment, CLASSES, rows, NO_MIX)[0][-1], _eager(AUGMENT, CLASSES, rows, NO_MIX)[0][-1])
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "three_augment"])
def test_a_policy_compiles_for_a_gpu(text: str) -> None:
    """Two layers of RandAugment, and 3-Augment with its jitter, on 256 images of 224 px: every kernel; about 30 in all."""
    from trainer.bench.gpu import counts, lowering, pretended

    augment = AUGMENT.model_copy(update={"policy": text, "policy_on": "device", "color_jitter": 0.3})
    rows, codes = with_policy(batch(256, 224), augment, 0), codes_of(augment)
    with pretended.h200():
        (graph,) = lowering.lower(
            lambda *given: whole(augment, CLASSES, codes, *given),
            *inputs(rows, augment, numbers(Mix(0.3))),
            backward=False,
            autocast=False,
        )
        gigabytes = sum(kernel.bytes for kernel in graph.kernels) / 1e9
        seconds = sum(map(counts.predicted, graph.kernels))
        print(f"{text}: {len(graph.kernels)} kernels, {gigabytes:.2f} GB, {1000 * seconds:.2f} ms predicted")
        assert len(graph.kernels) <= 30 and gigabytes < 4
        for name, source in graph.code.items():
            lowering.compile_kernel(name, source)


@pytest.mark.slow
def test_on_a_gpu_it_is_at_most_5_kernels_which_compile() -> None:
    from trainer.bench.gpu import lowering, pretended

    with pretended.h200():
        rows = batch(16, 32)
        (graph,) = lowering.lower(
            lambda *given: whole(AUGMENT, CLASSES, (), *given),
            *inputs(rows, AUGMENT, numbers(Mix(0.3))),
            backward=False,
            autocast=False,
        )
        assert len(graph.kernels) <= 5, [kernel.name for kernel in graph.kernels]
        for name, source in graph.code.items():
            lowering.compile_kernel(name, source)
