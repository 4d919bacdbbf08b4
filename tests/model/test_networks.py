"""Networks that are no plain VisionTransformer, from a configuration (docs/networks.md): what is refused by key, what is warned about,
which weights load, which parameters freeze."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sparsity.types import DENSE, Plan
from tests.support import images
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.config.schema import ModelConfig, OptimConfig
from trainer.model import batch_norm, weights
from trainer.model.build import build_model, build_pruning, cost_of
from trainer.model.optimizer import build_optimizer
from trainer.model.teacher import build_teacher

RESNET = {"name": "resnet18", "args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}
CONVNEXT = {"name": "convnext_atto", "args": {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "args": {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [1, 1, 3, 1], "num_heads": [1, 2, 2, 2]},
}
VIT = {"name": "deit_tiny_patch16_224", "args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}}


def config(model: dict[str, Any], size: int = 32, **sections: Any) -> Config:
    return images.config("nowhere", **{"model": model | {"classes": 4, "image_size": size}} | sections)


@pytest.mark.parametrize(
    ("model", "sections", "expected"),
    [
        (RESNET, {"tokens": {"method": "topk", "keep": 0.5}}, r"tokens.method=topk: a ResNet keeps all tokens.*swin_\*"),
        (SWIN, {"tokens": {"method": "tome", "keep": 0.5}}, r"tokens.method=tome with a SwinTransformer"),
        (SWIN, {"connections": {"method": "exact", "keep": 0.5}}, r"connections: a SwinTransformer has no level 3"),
        (RESNET, {"examples": {"method": "forgetting", "removed": 0.2}}, r"examples.ties=spread: .*set examples.ties=id"),
        (RESNET, {"engine": {"precision": "bf16", "zero": 1}}, r"engine.precision=bf16: .*batch norms.*precision=autocast"),
        (CONVNEXT | {"sync_batchnorm": True}, {}, r"model.sync_batchnorm=true: .*convnext_atto has no batch norm"),
        ({"name": "dla46_c"}, {"engine": {"checkpointing": True}}, r"engine.checkpointing=true: timm has no gradient"),
        ({"name": "vgg11", "drop_path": 0.1}, {}, r"model.drop_path=0.1: model.name=vgg11 has no drop path"),
        (RESNET | {"init": "random", "args": {"depth": 2}}, {}, r"model.name=resnet18 .*rejected by timm"),
    ],
)
def test_what_a_network_does_not_have_is_refused_by_key(model, sections, expected):
    with pytest.raises(ConfigError, match=expected):
        build_model(config(model, **sections))


@pytest.mark.parametrize("model", [RESNET, SWIN])
def test_level_4_and_token_distillation_are_refused_with_what_can(model, tmp_path):
    pruned = config(model, weights={"method": "magnitude", "keep": 0.5})
    with pytest.raises(ConfigError, match=r"weights.method=magnitude: .*vit_\* and deit\*.*weights.method=all"):
        build_pruning(pruned, build_model(pruned))
    with pytest.raises(ConfigError, match=r"teacher.tokens=1: .*teacher.tokens=0 and distil logits"):
        build_model(config(model, teacher={"from": str(tmp_path), "tokens": 1.0}))


def test_examples_by_id_and_by_attention():
    forgetting = {"method": "forgetting", "removed": 0.2}
    assert build_model(config(RESNET, examples=forgetting | {"ties": "id"})).gives == frozenset()
    assert "cls_attention" in build_model(config(SWIN, examples=forgetting)).gives


@pytest.mark.parametrize("synced", [False, True])
def test_batch_norms_are_warned_about_and_synchronised_in_place(synced):
    settings = config(RESNET | {"sync_batchnorm": synced})
    model = build_model(settings)
    (text,) = batch_norm.depends_on_world(model.network, settings)
    assert "13 batch norms" in text and ("with several processes set model.sync_batchnorm=true" in text) != synced
    accumulated = settings.changed(data={"batch": 64, "micro_batch": 16})
    (text,) = batch_norm.depends_on_world(model.network, accumulated)
    assert ("(data.batch=64) only a larger data.micro_batch helps" in text) != synced  # what the key cannot do
    assert batch_norm.is_synchronised(model) == synced
    plain = build_model(config(RESNET))
    assert list(model.network.state_dict()) == list(plain.network.state_dict())
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.train()(x).logits, plain.train()(x).logits)  # one process: torch's own
    assert batch_norm.depends_on_world(build_model(config(SWIN)).network, config(SWIN)) == []


def test_weights_of_other_classes_and_sizes_fit_where_timm_can_resize_them():
    for model, heads, resized in (
        (RESNET, ["fc.weight", "fc.bias"], ""),
        (SWIN, ["head.fc.weight", "head.fc.bias"], "relative_position"),
    ):
        larger = ModelConfig.model_validate(
            model | {"classes": 6, "image_size": 64, **({"args": model["args"] | {"window_size": 8}} if resized else {})}
        )
        told: list[str] = []
        net = weights.build(ModelConfig.model_validate(model | {"classes": 4, "image_size": 32}), 0)
        assert weights.fit(net, weights.build(larger, 1).state_dict(), "file", told.append) == heads
        assert any(resized in text for text in told) and any("reset to their initialisation" in text for text in told)


def test_a_number_in_freeze_counts_timms_layer_groups():
    net = build_model(config(RESNET)).network
    build_optimizer(net, OptimConfig(freeze=2))
    frozen = {name.split(".")[0] for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}
    with pytest.raises(ConfigError, match=r"optim.freeze=9: this network has 4 blocks"):
        build_optimizer(build_model(config(RESNET)).network, OptimConfig(freeze=9))
    with pytest.raises(ConfigError, match="timm has no layer groups for a MetaFormer"):
        build_optimizer(weights.build(ModelConfig(name="poolformer_s12", classes=4), 0), OptimConfig(freeze=1))


@pytest.mark.parametrize("synced", [False, True])
def test_a_frozen_batch_norm_stays_in_evaluation_mode(synced):
    """It normalises by its running statistics and keeps them, in a copy of the network too; the others follow the batches."""
    settings = config(RESNET | {"sync_batchnorm": synced})
    model = build_model(settings)
    build_optimizer(model, OptimConfig(freeze=2))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    for trained in (model, copy.deepcopy(model)):
        trained.eval()
        trained.train()
        x = torch.randn(4, 3, 32, 32)
        trained(x)
        after = trained.network.state_dict()
        changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert changed == {"layer3", "layer4"}
        stem = trained.network.get_submodule("bn1")
        assert not stem.training and trained.network.get_submodule("layer3.0.bn1").training
        assert torch.equal(stem(y := torch.randn(4, 64, 5, 5)), copy.deepcopy(stem).eval()(y))
    (text,) = batch_norm.depends_on_world(model.network, settings)
    assert f"has {len(batch_norm.following(model.network))} batch norms" in text


def test_layer_decay_follows_timms_layer_groups():
    net = build_model(config(SWIN)).network
    scales = {
        id(p): group["lr_scale"]
        for group in build_optimizer(net, OptimConfig(layer_decay=0.5)).param_groups
        for p in group["params"]
    }
    rates = [
        scales[id(net.get_parameter(name))]
        for name in ("patch_embed.proj.weight", "layers.2.blocks.0.mlp.fc1.weight", "head.fc.weight")
    ]
    assert rates == sorted(rates) and rates[0] < rates[1] < rates[2] == 1.0


def test_any_network_teaches_logits(tmp_path):
    teaching = config(RESNET)
    weights.save_weights(tmp_path / "resnet.safetensors", build_model(teaching).network.state_dict())
    teacher = {"from": str(tmp_path / "resnet.safetensors"), "logits": "soft", **RESNET}
    settings = config(VIT, teacher=teacher)
    student = build_model(settings)
    found = build_teacher(settings, student, frozenset())
    assert found.network is not None and found.multiply_adds == build_model(teaching).cost().total
    with pytest.raises(ConfigError, match=r"a ResNet gives no attention of \[CLS\].*teacher.tokens=0"):
        both = config(
            VIT, teacher=teacher | {"tokens": 1.0}, tokens={"method": "topk", "keep": 0.5, "blocks": [0], "position": "block"}
        )
        build_teacher(both, build_model(both), frozenset({"cls_attention"}))


def test_costs_for_journal_and_tables():
    swin = build_model(config(SWIN, tokens={"method": "topk", "keep": 0.5, "blocks": [2], "position": "block"}))
    assert cost_of(swin, Plan(0.5))["tokens"] == [256, 64, 16, 8, 8, 4]
    assert cost_of(swin, Plan(0.5))["multiply_adds"] < cost_of(swin, DENSE)["multiply_adds"]
    assert cost_of(build_model(config(RESNET)), DENSE)["tokens"] == []


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(ConfigError, match=r"model.image_size=32 is smaller than the patch size 64, so there is no patch"):
        build_model(config({"name": "deit_tiny_patch16_224", "image_size": 32, "args": {"patch_size": 64}}))
