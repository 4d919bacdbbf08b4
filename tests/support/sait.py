"""A weights file as `trilevel export` writes it, of a tiny network with one pruning block, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
import yaml

from tests.support import images as drawn
from trainer.config.run_config import Config
from trainer.data.shards.index import build_index
from trainer.model.weights import save_weights

ARGS = {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}  # 64 patches of 32 px
TOKENS = {"method": "topk", "keep": 0.5, "blocks": [1], "position": "block"}
WEIGHTS = "weights.safetensors"


def write(folder: Path) -> Config:
    """c.yaml over 40 drawn images, one of them broken, and weights whose importance is not flat, in the current folder."""
    pattern = drawn.write_shards(folder / "drawn", [20, 20], broken={9})
    build_index(pattern, progress=False)
    found = drawn.config(pattern, evaluate={"batch": 8}, tokens=TOKENS).changed(model={"args": ARGS})
    Path("c.yaml").write_text(yaml.safe_dump(found.resolved()))
    torch.manual_seed(1)
    network = timm.create_model(found.model.name, num_classes=found.model.classes, img_size=32, **ARGS)
    network.blocks[1].attn.qkv.weight.data *= 12.0
    header = {"model": found.model.name, "classes": str(found.model.classes), "image_size": "32", "args": json.dumps(ARGS)}
    save_weights(WEIGHTS, network.state_dict(), header | {"tokens": json.dumps(found.resolved()["tokens"])})
    return found
