"""Optimizer groups, learning rate and weight average against timm's own."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from tests.support.vits import FAMILIES, images
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.config.run_config import ELEMENTWISE
from trainer.config.schema import OptimConfig
from trainer.model.build import build_schedule
from trainer.model.ema import Ema
from trainer.model.optimizer import build_optimizer, has_fused
from trainer.model.schedule import set_learning_rate


class Wrapped(nn.Module):
    """A timm model inside another, as SparseNetwork holds it."""

    def __init__(self, network):
        super().__init__()
        self.network = network


def vit(name="deit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, img_size=32, num_classes=5, embed_dim=16, depth=2, num_heads=2, **kwargs)


def groups(optimizer, model):
    """{name: (weight decay, lr scale)} of every parameter, and the options all groups share."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        found |= {names[id(p)]: (group["weight_decay"], group.get("lr_scale", 1.0)) for p in group["params"]}
    options = [{k: v for k, v in g.items() if k not in ("params", "weight_decay", "lr_scale")} for g in optimizer.param_groups]
    assert all(option == options[0] for option in options)
    return found, options[0]


def config(epochs=10, **optim):
    return parse(
        {
            "name": "t",
            "epochs": epochs,
            "model": {"name": "deit_tiny_patch16_224"},
            "data": {"train": "x", "validation": "x"},
            "optim": optim,
        }
    )


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
@pytest.mark.parametrize("layer_decay", [None, 0.65])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_groups_and_options_are_timms(name, layer_decay, optimizer):
    model = vit(name)
    options = {"weight_decay": 0.07, "layer_decay": layer_decay, "betas": (0.8, 0.95), "eps": 1e-7}
    ours = build_optimizer(Wrapped(model), OptimConfig(name=optimizer, lr=3e-3, **options))
    theirs = create_optimizer_v2(model, optimizer, lr=3e-3, filter_bias_and_bn=True, **options)
    assert type(ours) is type(theirs)
    assert groups(ours, model) == groups(theirs, model)


def test_what_is_not_decayed_by_hand():
    model = vit()
    found, _ = groups(build_optimizer(Wrapped(model), OptimConfig(weight_decay=0.05)), model)
    assert found.keys() == dict(model.named_parameters()).keys()
    free = {name for name, (decay, _) in found.items() if decay == 0}
    assert free == {n for n in found if n.endswith("bias") or ".norm" in n or n in ("norm.weight", "pos_embed", "cls_token")}
    assert found["blocks.0.attn.qkv.weight"] == found["head.weight"] == found["patch_embed.proj.weight"] == (0.05, 1.0)


def test_unknown_names_and_forgotten_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"optim.name='adammw'.*did you mean .*adamw"):
        build_optimizer(vit(), OptimConfig(name="adammw"))
    model = Wrapped(vit())
    model.gate = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"gate.weight, gate.bias: trainable parameters outside"):
        build_optimizer(model, OptimConfig())


def trained(model: nn.Module, what: int | tuple[str, ...], **settings) -> set[str]:
    """The names of the parameters in the optimizer's groups; the others have no gradient."""
    optimizer = build_optimizer(model, OptimConfig(freeze=what, **settings))
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert all((id(parameter) in mine) == parameter.requires_grad for parameter in model.parameters())
    return {name for name, parameter in model.named_parameters() if id(parameter) in mine}


@pytest.mark.parametrize("family", ["deit", "deit_distilled", "registers", "norms_inside", "map_pooling"])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_the_first_blocks_are_frozen_with_everything_in_front_of_them(family, layer_decay):
    """A gradient that reaches the input of block 2 passes only what trains."""
    model = FAMILIES[family]()
    every = {name for name, _ in model.named_parameters()}
    model.forward_features(images(model)).sum().backward()
    model.zero_grad()
    reached = model.patch_embed(images(model))
    x = model.norm_pre(model._pos_embed(reached))
    for block in model.blocks[:2]:
        x = block(x)
    x.sum().backward()
    front = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in front} >= {"patch_embed", "pos_embed", "blocks"} and len(front) < len(every)
    model.zero_grad()
    assert trained(model, 2, layer_decay=layer_decay) == every - front


def test_nothing_is_frozen_by_default_and_patterns_freeze_names():
    every = {name for name, _ in vit().named_parameters()}
    assert trained(vit(), 0) == every == trained(vit(), ())
    attention = {name for name in every if ".attn." in name}
    assert trained(vit(), ("*.attn.*", "pos_embed")) == every - attention - {"pos_embed"} and attention
    first = {name for name in every if name.startswith(("blocks.0.", "blocks.1."))}
    assert trained(vit(), ("blocks.[01].*",)) == every - first


def test_freezing_what_is_not_there_or_everything_is_refused():
    with pytest.raises(ConfigError, match=r"optim.freeze=9: this network has \d blocks; freeze at most \d"):
        build_optimizer(vit(), OptimConfig(freeze=9))
    with pytest.raises(
        ConfigError, match=r"optim.freeze='blok.*': no parameter of the network has such a name; did you mean blocks.\*"
    ):
        build_optimizer(vit(), OptimConfig(freeze=("blok.*",)))
    with pytest.raises(
        ConfigError, match=r"optim.freeze='pos_embedd': no parameter of the network has such a name; did you mean pos_embed"
    ):
        build_optimizer(vit(), OptimConfig(freeze=("head.*", "pos_embedd")))
    with pytest.raises(ConfigError, match=r"optim.freeze=\('\*',\): nothing would train"):
        build_optimizer(vit(), OptimConfig(freeze=("*",)))


def test_an_optimizer_without_betas_is_built_too():
    assert isinstance(build_optimizer(vit(), OptimConfig(name="sgd")), torch.optim.SGD)


@pytest.mark.parametrize("warmup", ["0ep", "2ep", "2.5ep"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_learning_rate_is_timms_at_every_step(warmup, layer_decay):
    settings = config(epochs=8, lr=2e-3, warmup=warmup, warmup_lr=1e-6, min_lr=1e-5, layer_decay=layer_decay)
    schedule, model, batches = build_schedule(settings), vit(), 6
    ours, theirs = build_optimizer(model, settings.optim), build_optimizer(model, settings.optim)
    scheduler = CosineLRScheduler(
        theirs, 8 * batches, lr_min=1e-5, warmup_t=int(settings.optim.warmup * batches), warmup_lr_init=1e-6, t_in_epochs=False
    )
    for step in range(8 * batches + 3):
        scheduler.step_update(step)
        set_learning_rate(ours, schedule.lr(step / batches))
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert a["lr"] == pytest.approx(b["lr"], rel=1e-12)


def test_fewer_batches_in_an_epoch_do_not_shift_the_schedule():
    settings = config(epochs=8, lr=2e-3, warmup="2ep")
    schedule = build_schedule(settings)
    assert schedule.lr(5 + 3 / 6) == schedule.lr(5 + 2 / 4)
    assert schedule.lr(8.0) == settings.optim.min_lr


@pytest.mark.parametrize("decay", [0.9, 0.99996])
def test_average_is_timms_to_the_bit(decay):
    model = nn.Sequential(vit(), nn.BatchNorm1d(5))  # float and integer buffers
    ours, theirs = Ema(model, decay), ModelEmaV3(model, decay=decay)
    for step in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            model[1].running_mean.add_(1)
            model[1].num_batches_tracked.fill_(step)
        ours.update()
        theirs.update(model)
    expected = theirs.module.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


def test_where_only_the_device_knows_the_average_follows_taken_steps_alike():
    """On a GPU whether a step was taken is a number of the device: the same averages to rounding, and to the bit those of before where it
    was left out. Buffers too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    there, here = Ema(model, 0.9), Ema(model, 0.9)
    for step, taken in enumerate((True, False, True)):
        before = there.state_dict()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model[1].running_mean.add_(1)
            model[1].running_var.add_(1)
            model[1].num_batches_tracked.fill_(step + 1)
        there.update(torch.tensor(taken))
        here.update(taken)
        for name, value in there.state_dict().items():
            assert torch.equal(value, before[name]) == (not taken), name
            torch.testing.assert_close(value, here.state_dict()[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "has"), [("adamw", True), ("sgd", True), ("lamb", False), ("lookahead_adamw", True), ("nothing", False)]
)
def test_on_a_gpu_the_fused_step_is_the_default_where_there_is_one(monkeypatch: pytest.MonkeyPatch, name: str, has: bool):
    assert has_fused(name) == has
    if name == "nothing":
        return

    def fused(**settings: Any) -> bool:
        optimizer = build_optimizer(vit(), OptimConfig(name=name, **settings))
        return bool(optimizer.param_groups[0].get("fused"))

    assert not fused()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fused() == has and not fused(fused=False)


@pytest.mark.parametrize("name", [*sorted(ELEMENTWISE), "cadamw", "clion", "lamb"])
def test_only_optimizers_that_update_each_weight_by_itself_may_be_cut_by_zero(name: str):
    """Three steps of two parameters, and of one flat partition that holds both."""

    def stepped(*parts: torch.Tensor) -> torch.Tensor:
        parameters = [nn.Parameter(part.clone()) for part in parts]
        optimizer = create_optimizer_v2(parameters, opt=name, lr=0.01, weight_decay=0.05)
        for step in range(3):
            gradient = torch.randn(17, generator=torch.Generator().manual_seed(step)).split([len(p) for p in parameters])
            for parameter, part in zip(parameters, gradient, strict=True):
                parameter.grad = part.clone()
            optimizer.step()
        return torch.cat([p.detach() for p in parameters])

    values = torch.linspace(-1, 2, 17)
    assert torch.allclose(stepped(values[:12], values[12:]), stepped(values), rtol=0, atol=1e-7) == (name in ELEMENTWISE)


def test_average_accumulates_in_float32_where_weights_are_bf16():
    model = nn.Linear(4, 4).bfloat16()
    ema = Ema(model, 0.9999)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    moved = ema.state_dict()["weight"] - before
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=2e-2, atol=0)


def test_applied_swaps_and_gives_back_even_after_an_error():
    model = vit()
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.head.weight.add_(1)
    ema.update()
    weights, averages = copy.deepcopy(model.state_dict()), ema.state_dict()
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        assert all(torch.equal(value, averages[name]) for name, value in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_average_survives_saving_and_refuses_another_models():
    model = vit()
    first, second = Ema(model, 0.9), Ema(model, 0.9)
    with torch.no_grad():
        model.head.weight.add_(1)
    first.update()
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    with pytest.raises(ConfigError, match="another model"):
        Ema(nn.Linear(2, 2), 0.9).load_state_dict(first.state_dict())


def test_without_a_decay_nothing_is_kept():
    model = vit()
    ema = Ema(model, None)
    before = copy.deepcopy(model.state_dict())
    ema.update()
    with ema.applied(model):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ema.state_dict() == {}
    ema.load_state_dict({})


def test_a_fused_step_is_asked_for_by_name_and_refused_where_there_is_none():
    assert all(group["fused"] for group in build_optimizer(vit(), OptimConfig(fused=True)).param_groups)
    assert not any(group.get("fused") for group in build_optimizer(vit(), OptimConfig()).param_groups)
    with pytest.raises(ConfigError, match=r"optim.fused=true: lamb has no fused step"):
        build_optimizer(vit(), OptimConfig(name="lamb", fused=True))


def test_layer_decay_scales_the_rate_of_every_group_at_every_step():
    model = vit()
    optimizer = build_optimizer(model, OptimConfig(layer_decay=0.5))
    set_learning_rate(optimizer, 1e-2)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert len(rates) == 4 and all(lr == pytest.approx(1e-2 * scale) for scale, lr in rates.items())
