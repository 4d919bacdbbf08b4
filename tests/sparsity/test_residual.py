"""Tokens between blocks in bf16: how far the logits move from float64, beside timm's own autocast; and what stays float32."""

from __future__ import annotations

import pytest
import timm
import torch

from sparsity.types import Plan
from sparsity.vit import SparseViT
from tests.support.vits import images, tiny
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.model.build import build_model

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_the_error_is_at_most_twice_that_of_timms_autocast(name: str) -> None:
    """Root mean square over logits, 12 blocks, all kept: 1.45 and 1.10 times on 2026-11-22 (docs/laws.md, law 1)."""
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=64, num_classes=1000).eval()
    for parameter in vit.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    x = torch.randn(4, 3, 64, 64)
    ours = SparseViT(vit)
    ours.residual = torch.bfloat16
    with torch.no_grad():
        exact = vit.double()(x.double())
        vit.float()
        with AUTOCAST:
            errors = [float((logits.double() - exact).square().mean().sqrt()) for logits in (ours(x).logits, vit(x))]
    assert errors[1] < errors[0] < 2 * errors[1]


def test_tokens_are_bf16_between_blocks_with_layer_scale_too_and_parameters_stay_float32() -> None:
    model = SparseViT(tiny(init_values=0.1).train())
    model.residual, kinds = torch.bfloat16, []
    for block in model.network.blocks:
        block.norm1.register_forward_pre_hook(lambda _, given: kinds.append(given[0].dtype))
    with AUTOCAST:
        model(images(model.network), Plan(), rng_keys=torch.arange(4)).logits.float().sum().backward()
    assert kinds == [torch.bfloat16] * 3
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_the_setting_is_refused_where_it_does_nothing() -> None:
    settings = {"name": "x", "model": {"name": "deit_tiny_patch16_224"}, "data": {"train": "a.tar", "validation": "b.tar"}}
    config = parse(settings | {"engine": {"residual": "bf16"}})
    assert build_model(config).residual == torch.bfloat16
    with pytest.raises(ConfigError, match=r"engine.residual=bf16 with engine.precision=float32: only autocast"):
        parse(settings | {"engine": {"residual": "bf16", "precision": "float32"}})
    with pytest.raises(ConfigError, match=r"engine.residual=bf16: model.name=resnet18 keeps its tokens in float32"):
        build_model(parse(settings | {"model": {"name": "resnet18"}, "engine": {"residual": "bf16"}}))
