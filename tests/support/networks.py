"""Small networks of timm that are no plain VisionTransformer, one of each kind that `Dense` and Swin are tested on."""

from __future__ import annotations

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

SIZE = 32  # pixels

CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}
SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1, 4, 1), "num_heads": (1, 2, 2, 2)}
NAMES: dict[str, tuple[str, dict]] = {
    "convnext": ("convnext_atto", CONVNEXT),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
    "efficientnet": ("efficientnet_lite0", {}),
    "maxvit": ("maxvit_pico_rw_256", {"embed_dim": (32,) * 4, "depths": (1, 1, 1, 1), "stem_width": 8}),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "swin_v2_cr": (
        "swinv2_cr_tiny_ns_224",
        {"patch_size": 2, "window_size": 4, **{k: SWIN[k] for k in ("embed_dim", "depths", "num_heads")}},
    ),
}

KINDS = (*NAMES, "mixer")


def network(kind: str, drop_path: float = 0.0, **args) -> nn.Module:
    """Seeded, with scales far from 0 and 1, or a branch that is dropped would go unnoticed."""
    torch.manual_seed(0)
    if kind == "mixer":
        made: nn.Module = MlpMixer(5, SIZE, patch_size=8, num_blocks=2, embed_dim=16, drop_path_rate=drop_path, **args)
    else:
        name, settings = NAMES[kind]
        size = {"img_size": SIZE} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        made = timm.create_model(name, num_classes=5, drop_path_rate=drop_path, **size, **settings, **args)
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1 and "bias" not in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for module in made.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return made


def pixels(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def swin(size: int = 32, version: int = 1, **args) -> SwinTransformer | SwinTransformerV2:
    """Windows of 4 x 4; stage 3 has blocks 2 to 7 and 8 x 8 tokens at 64 pixels, 5 x 5 at 40, where windows do not divide it."""
    settings = {
        "patch_size": 2,
        "embed_dim": 12,
        "depths": (1, 1, 6, 1),
        "num_heads": (1, 2, 3, 4),
        "num_classes": 5,
        "drop_path_rate": 0.3,
    }
    torch.manual_seed(0)
    kind = SwinTransformer if version == 1 else SwinTransformerV2
    made = kind(img_size=size, window_size=4, **(settings | args))
    for name, parameter in made.named_parameters():  # far from zero, or a swapped norm or bias would go unnoticed
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else nn.init.normal_(
            parameter, 0.5 if "bias" not in name else 0.1, 0.2
        )
    return made
