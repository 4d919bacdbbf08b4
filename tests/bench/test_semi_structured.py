"""2:4 weights for NVIDIA GPUs: the pattern, what is refused, and the way of a network there up to the products, which need the GPU."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from tests.support import images as drawn
from trainer.__main__ import main
from trainer.bench import forms, pruned, semi_structured
from trainer.bench.gpu import __main__ as gpu
from trainer.bench.gpu.semi_structured import packed_and_back
from trainer.config.errors import ConfigError

CPU = torch.device("cpu")
MODEL = {"image_size": 32, "args": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}}


def config(**weights: Any) -> Any:
    settings = {"method": "magnitude", "keep": 0.5, "prune": "0ep", "groups": "columns", "block": [1, 4]} | weights
    return drawn.config("nowhere", weights=settings).changed(model=MODEL)


@pytest.mark.parametrize("rows", [1, 16])
def test_columns_of_blocks_four_wide_leave_two_of_each_four(rows: int) -> None:
    level = forms.of_config(config(block=[rows, 4])).level
    assert len(semi_structured.layers(level)) == 8
    for mask in level.masks().values():
        assert torch.equal(mask.view(-1, 4).sum(1), torch.full((mask.numel() // 4,), 2))


def test_torch_stores_what_is_kept_to_the_bit_and_the_network_computes_the_same_logits() -> None:
    found = forms.of_config(config())
    with torch.no_grad():
        found.vit.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    given: list[torch.Size] = []

    def noted(weight: torch.Tensor) -> torch.Tensor:
        given.append(weight.shape)
        return packed_and_back(weight)

    network, size = semi_structured.semi_structured(found.vit, found.level, CPU, noted)
    assert given == 2 * [torch.Size(one) for one in ((192, 64), (64, 64), (256, 64), (64, 256))]
    assert size == sum(2 * parameter.numel() for parameter in found.vit.parameters())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, right = network(images), semi_structured.InBf16(found.vit.to(torch.bfloat16))(images)
    assert torch.equal(logits, right) and logits.dtype == torch.float32 and logits.std() > 0.01
    three = torch.ones(32, 64, dtype=torch.bfloat16)
    assert not torch.equal(packed_and_back(three), three), "four of four do not come back"


def test_a_semi_structured_tensor_has_9_bytes_of_16() -> None:
    weight = torch.zeros(64, 128, dtype=torch.bfloat16)
    stored: Any = SimpleNamespace(packed=torch.zeros(64, 64, dtype=torch.bfloat16), meta=torch.zeros(64, 8, dtype=torch.int16))
    assert semi_structured.stored_bytes(stored) / semi_structured.stored_bytes(weight) == 9 / 16
    rule = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]
    assert (rule.sparse_min_rows, rule.sparse_min_cols) == 2 * (semi_structured.MULTIPLE,)


def test_other_groups_sizes_and_devices_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Any
) -> None:
    with pytest.raises(
        ConfigError, match=r"--forms 2:4: needs an NVIDIA GPU of compute capability 8\.0 or higher, here is a CPU; leave"
    ):
        forms.refuse(["2:4"], CPU)
    assert main(["bench", "inference", "configs/blocks_digits.yaml", "--forms", "dense,2:4", "--batches", "1"]) == 2
    assert "here is a CPU; leave 2:4 out" in capsys.readouterr().err
    device = torch.device("cuda")
    for capability, hip, here in (((7, 5), None, r"here is one of 7\.5"), ((9, 4), "6.4", "here is an AMD GPU")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.version, "hip", hip)
        with pytest.raises(ConfigError, match=here):
            forms.refuse(["2:4"], device)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    forms.refuse(["2:4"], device)
    monkeypatch.setattr(forms, "semi_structured_here", lambda device: None)
    layers = r"2:4: blocks\.0\.attn\.qkv"
    for settings, message in (
        (
            {"block": [16, 16]},
            rf"{layers} keeps more than two of four neighbours in a row; train with weights=\{{groups: columns, block: \[1,",
        ),
        ({"keep": 0.75}, rf"{layers} keeps more than two"),
        ({"groups": "rows"}, rf"{layers} keeps more than two"),
        ({"groups": "units"}, r"2:4: blocks\.0\.mlp keeps more than two"),
        ({}, r"2:4: torch .* refuses a weight of \[192, 64\] here: .*CUDA"),
    ):
        with pytest.raises(ConfigError, match=message):
            pruned.bench(config(**settings), ["2:4"], [1], 1)
    small = config().changed(model=MODEL | {"args": MODEL["args"] | {"embed_dim": 24}})
    with pytest.raises(
        ConfigError, match=rf"{layers} has 72 x 24 weights, torch needs multiples of 16; leave the layer out of weights\.l"
    ):
        pruned.bench(small, ["2:4"], [1], 1)


def test_the_table_has_it_beside_a_dense_network_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "semi_structured_here", lambda device: None)
    monkeypatch.setattr(forms, "semi_structured", partial(semi_structured.semi_structured, convert=packed_and_back))
    found = pruned.bench(config(), ["2:4"], [2], rounds=2)
    assert list(found.rows) == ["2 x timm", "2 x 2:4", "2 x dense, bf16"]
    assert found.rows["2 x 2:4"]["bound"] > 1.5 and found.rows["2 x dense, bf16"]["bound"] == 1.0
    assert any("2:4 has bf16 weights, as the row dense, bf16" in note for note in found.notes)


def test_on_a_gpu_products_and_the_network_are_measured(capsys: Any) -> None:
    """Here in its tiny form on the CPU, where the weights are packed and unpacked again."""
    assert gpu.main(["sparse"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("ok  ") == 5 and "2:4 DeiT-S, 2 images" in shown
