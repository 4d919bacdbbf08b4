"""Every optimizer of timm continues to the bit from its stored state, through the format of a checkpoint; what cannot is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import list_optimizers
from torch import nn

from trainer.config.errors import ConfigError
from trainer.config.schema import OptimConfig
from trainer.engine.full_state import FullState
from trainer.engine.optimizer_numbers import decoded, encoded
from trainer.model.optimizer import build_optimizer

HERE = torch.device("cpu")
# a step count of Python, of a tensor, of the groups; numbers that differ between parameters; states of other shapes; a wrapper
KINDS = (
    "adamw",
    "sgd",
    "lamb",
    "mars",
    "laprop",
    "nadamlegacy",
    "novograd",
    "muon",
    "adafactor",
    "adafactorbv",
    "lookahead_adamw",
)


class Network(nn.Module):
    """With a parameter without dimensions, and one that the first steps leave without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        small = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 4}
        self.vit = timm.create_model("vit_tiny_patch16_224", **small)
        self.scale, self.late = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(4))

    def forward(self, images: torch.Tensor, step: int) -> torch.Tensor:
        logits = self.vit(images) * self.scale
        return logits + self.late if step > 5 else logits


def trained(network: Network, optimizer: torch.optim.Optimizer, begin: int, end: int) -> Network:
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(0, 4, (4,), generator=generator)
        torch.manual_seed(step)
        nn.functional.cross_entropy(network(images, step), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


def difference(name: str, file: Path) -> float:
    settings = OptimConfig(name=name, lr=1e-3, fused=False)
    whole, first, again = Network(), Network(), Network()
    trained(whole, build_optimizer(whole, settings), 0, 8)
    stopped = build_optimizer(first, settings)
    trained(first, stopped, 0, 4)
    state = FullState(first, stopped, 0, 1, HERE)
    weights = state.weights()
    save_file(state.optimizer_state(), file)
    resumed = build_optimizer(again, settings)
    FullState(again, resumed, 0, 1, HERE).load(weights, load_file(file))
    trained(again, resumed, 4, 8)
    ours, theirs = again.state_dict(), whole.state_dict()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)


@pytest.mark.parametrize("name", KINDS)
def test_a_resume_continues_to_the_bit(name: str, tmp_path: Path) -> None:
    assert difference(name, tmp_path / "state.safetensors") == 0.0


@pytest.mark.slow
def test_every_optimizer_of_timm_continues_to_the_bit_or_is_refused(tmp_path: Path) -> None:
    refused, equal = [], 0
    for name in [*map(str, list_optimizers()), *(f"lookahead_{name}" for name in KINDS[:-1])]:
        try:
            assert difference(name, tmp_path / f"{name}.safetensors") == 0.0, name
            equal += 1
        except ConfigError as error:
            assert f"optim.name={name}: " in str(error)
            refused.append(name)
    left = {name for name in refused if not name.startswith(("bnb", "fused"))}  # these need CUDA and their libraries
    assert left <= {"adahessian", "adan", "adanw", "cadan", "cadanw", "kron", "kronc", "kronw"} and equal > 80


def test_an_optimizer_that_fails_or_cannot_be_stored_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"optim.name=adan: cannot be used here, a step fails with IndexError"):
        build_optimizer(Network(), OptimConfig(name="adan"))
    with pytest.raises(
        ConfigError, match=r"optim.name=kron: a checkpoint holds tensors and numbers, its state \(Q\) has others"
    ):
        build_optimizer(Network(), OptimConfig(name="kron"))


@pytest.mark.parametrize("value", [True, False, 3, -1, 0.1, 1e-300])
def test_numbers_of_python_come_back_as_they_were(value: float) -> None:
    name, stored = encoded("a|key", value)
    (key, found), kind = decoded(name, stored), type(value)
    assert (key, found) == ("a|key", value) and type(found) is kind and stored.ndim == 0
