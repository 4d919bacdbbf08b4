"""Running statistics of batch norms: the mean over the ranks after a step, and untouched by a step that is not taken (law 13 of
docs/laws.md) and by timed passes (law 16 of docs/laws.md)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsity.build import build
from tests.support.networks import SIZE, network, pixels
from trainer.model.optimizer import freeze
from trainer.run.running_statistics import RunningStatistics


def ranks(world: int, others: float = 0.0) -> Any:
    """A stand-in for the engine: every other rank has statistics that are larger by `others`."""

    def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(world).add_(others * (world - 1))

    return SimpleNamespace(world=world, all_reduce_sum=all_reduce_sum)


def state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


@pytest.mark.parametrize("taken", [True, torch.tensor(True)])
def test_a_taken_step_has_the_mean_over_the_ranks(taken):
    net = network("resnet").train()
    level = RunningStatistics(net, ranks(4, others=1.0))
    net(pixels())
    own = state(net)
    level.after_step(taken)
    for name, value in net.named_buffers():
        expected = own[name] if "num_batches" in name else own[name] + 0.75
        assert torch.allclose(value, expected, atol=1e-6), name
    for alone in (RunningStatistics(net, ranks(1)), RunningStatistics(net, ranks(4, others=1.0), alike=True)):
        before = state(net)
        alone.after_step(True)
        assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


@pytest.mark.parametrize("refused", [False, torch.tensor(False)])
def test_a_step_that_is_not_finite_leaves_them_as_they_were(refused):
    """Whether the host decides, or the device."""
    net = network("resnet").train()
    level, before = RunningStatistics(net, ranks(2)), state(net)
    net(pixels().fill_(float("nan")))
    assert not all(value.isfinite().all() for value in net.buffers())
    level.after_step(refused)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_passes_beside_the_training_are_undone():
    net = network("resnet").train()
    level = RunningStatistics(net, ranks(1))
    net(pixels())
    level.after_step(True)
    before = state(net)
    net(pixels(seed=1))
    level.restore()
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_networks_without_batch_norms_have_none():
    level = RunningStatistics(build(network("convnext"), image_size=SIZE), ranks(3))
    level.after_step(False), level.after_step(True), level.restore()
    assert not level._buffers


def test_frozen_norms_are_not_averaged_over_the_ranks():
    """The mean of three equal numbers can differ from them in the last bit."""
    net = network("resnet").train()
    freeze(net, ("bn1.*",))
    level, before = RunningStatistics(net, ranks(3, others=1.0)), state(net)
    net(pixels())
    level.after_step(True)
    same = {name.split(".")[0] for name, value in net.named_buffers() if torch.equal(value, before[name])}
    assert same == {"bn1"}
