"""Weights files of others: a file that is no state_dict of this network is refused by name, whatever its readers raise."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from trainer.config.errors import ConfigError
from trainer.model.weights import fit, load_weights


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    sizes: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    return cast(VisionTransformer, timm.create_model("vit_tiny_patch16_224", **sizes))


ODD: dict[str, Callable[[dict[Any, Any]], object]] = {
    "a key that is a number": lambda state: state.update({1: torch.zeros(2)}),
    "embedding of one axis": lambda state: state.update(pos_embed=torch.zeros(5)),
    "embedding of no tokens": lambda state: state.update(pos_embed=torch.zeros(1, 0, 8)),
    "embedding of 12 tokens": lambda state: state.update(pos_embed=torch.zeros(1, 12, 8)),
    "kernel of 47 numbers": lambda state: state.update({"patch_embed.proj.weight": torch.zeros(8, 47)}),
    "kernel of no pixels": lambda state: state.update({"patch_embed.proj.weight": torch.zeros(8, 3, 0, 0)}),
    "complex numbers": lambda state: state.update({"norm.weight": torch.zeros(8, dtype=torch.complex64)}),
    "sparse": lambda state: state.update({"norm.weight": torch.zeros(8).to_sparse()}),
    "without values": lambda state: state.update({"norm.weight": torch.zeros(8, device="meta")}),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_are_refused(name: str, model: VisionTransformer, tmp_path: Path) -> None:
    state: dict[Any, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    ODD[name](state)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match=r"odd\.pth"):
        fit(model, load_weights(tmp_path / "odd.pth"), str(tmp_path / "odd.pth"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["x.safetensors", "zip.pth", "old.pth"])
def test_changed_bytes_are_refused_or_read(kind: str, model: VisionTransformer, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "x.safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip.pth")
    plain, rng, refused = path.read_bytes(), random.Random(3), 0
    for _ in range(150):
        changed = bytearray(plain)
        for _ in range(rng.choice((1, 2, 8))):
            changed[rng.randrange(min(len(changed), 3000))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            fit(model, load_weights(path), kind, warn=lambda text: None)
        except ConfigError as error:
            assert kind in str(error)
            refused += 1
    assert refused > 10
