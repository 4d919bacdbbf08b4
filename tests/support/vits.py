"""Tiny networks of every family of timm's VisionTransformer that law 1 of docs/laws.md is tested on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import HybridEmbed, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn


def tiny(kind: type[VisionTransformer] = VisionTransformer, **args) -> VisionTransformer:
    settings = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 5,
        "drop_path_rate": 0.3,
    }
    vit = kind(**(settings | args))
    for name, parameter in vit.named_parameters():  # far from zero, or a swapped norm or scale would go unseen
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else nn.init.normal_(
            parameter, 0.5 if "bias" not in name else 0.0, 0.2
        )
    return vit


def _gated() -> VisionTransformer:
    vit = tiny()
    for block in vit.blocks:
        block.attn.gate = nn.Linear(24, 24)
    return vit


def _hybrid() -> VisionTransformer:
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1))
    return tiny(embed_layer=partial(HybridEmbed, backbone=convolutions), patch_size=1)


def _unfused() -> VisionTransformer:
    vit = tiny(attn_drop_rate=0.1)
    for block in vit.blocks:
        block.attn.fused_attn = False
    return vit


FAMILIES: dict[str, Callable[[], VisionTransformer]] = {
    "deit": tiny,
    "deit_distilled": lambda: tiny(VisionTransformerDistilled),
    "deit3_layer_scale": lambda: tiny(init_values=1e-4, no_embed_class=True),
    "registers": lambda: tiny(reg_tokens=3, no_embed_class=True, init_values=1e-5),
    "qk_norm": lambda: tiny(qk_norm=True),
    "norms_inside": lambda: tiny(scale_attn_norm=True, scale_mlp_norm=True, pre_norm=True),
    "map_pooling": lambda: tiny(class_token=False, global_pool="map"),
    "average_pooling": lambda: tiny(class_token=False, global_pool="avg"),
    "registers_without_cls": lambda: tiny(class_token=False, reg_tokens=2, global_pool="avg", no_embed_class=True),
    "prr_pooling": lambda: tiny(global_pool="prr"),
    "many_tokens": lambda: tiny(img_size=48, patch_size=4),
    "px_384": lambda: tiny(img_size=384, patch_size=16),
    "not_square": lambda: tiny(img_size=(16, 24)),
    "patch_8": lambda: tiny(img_size=32, patch_size=8),
    "patch_drop": lambda: tiny(patch_drop_rate=0.4),
    "dropout": lambda: tiny(drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1),
    "swiglu": lambda: tiny(mlp_layer=SwiGLU),
    "post_norm": lambda: tiny(block_fn=ResPostBlock, init_values=0.3),
    "gated": _gated,
    "hybrid": _hybrid,
    "unfused_attention": _unfused,
    "any_image_size": lambda: tiny(dynamic_img_size=True, mlp_layer=Mlp),
}


def images(vit: VisionTransformer, batch: int = 4, seed: int = 0) -> Tensor:
    height, width = vit.patch_embed.img_size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def logits_and_grads(vit: nn.Module, forward: Callable[[], Tensor], seed: int = 7) -> tuple[Tensor, list[Tensor | None]]:
    """Logits and the gradients of a fixed, uneven function of them, from one state of the global generator."""
    vit.zero_grad()
    torch.manual_seed(seed)
    logits = forward()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), [None if p.grad is None else p.grad.clone() for p in vit.parameters()]
