"""The counts of a step on an H200: the arithmetic of a prediction, the table's rows, and the stored table against today's graphs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import ROOT
from trainer.bench.gpu import counts, pretended
from trainer.bench.gpu.lowering import Kernel
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.config.run_config import Config

SMALL = ["model.image_size=32", "model.args={embed_dim: 48, depth: 2, num_heads: 3, patch_size: 8}", "tokens.blocks=[0]",
         "data.micro_batch=4", "data.batch=96"]  # fmt: skip


def config(*overrides: str) -> Config:
    return load(ROOT / "configs/tri_level_deit_small_0.7.yaml", overrides)


def test_a_kernel_takes_the_longer_of_its_bytes_and_its_arithmetic() -> None:
    assert counts.predicted(Kernel("copy", bytes=4 * 10**9, flops=0)) == pytest.approx(1e-3)
    assert counts.predicted(Kernel("mm", bytes=10**6, flops=55 * 10**10)) == pytest.approx(1e-3)
    forward = Kernel("flash", bytes=0, flops=0, attention=(6, 139, 64, 64, False))
    assert counts.attention_flops(forward) == 4 * 6 * 192 * 64 * 64, "139 queries take three tiles of 64"
    backward = Kernel("flash", bytes=0, flops=0, attention=(6, 139, 64, 64, True))
    assert counts.attention_flops(backward) == 2.5 * counts.attention_flops(forward)


def test_unknown_rows_and_networks_without_tokens_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--rows: unknown value 'sparse'; valid values: timm; dense; dense, bf16 residual; tokens 0.9"
    ):
        counts.bench(config(), ["sparse"])
    convolutional = config().changed(model={"name": "resnet18"})
    with pytest.raises(ConfigError, match=r"model.name=resnet18: "):
        counts.network_of(convolutional, counts.rows()["tokens 0.7"])


@pytest.mark.slow
def test_a_small_table_is_made_with_fewer_bytes_where_less_is_computed() -> None:
    found = counts.bench(config(*SMALL), ["tokens 0.5"])
    dense, half = (found.rows[name] for name in ("dense", "tokens 0.5"))
    assert dense["kernels"] > 50 and dense["of_dense"] == 1.0 and half["teraflops"] < dense["teraflops"]
    assert dense["attention_teraflops"] > 0 and "not measured on a GPU" not in found.title and len(found.notes) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(counts.rows()))
def test_the_stored_table_is_what_inductor_makes(name: str) -> None:
    """docs/results/gpu-counts.json, to 2 %: a change that moves a number says why and stores the table again."""
    stored: dict[str, Any] = json.loads((ROOT / "docs/results/gpu-counts.json").read_text())
    with pretended.h200():
        now = counts.counted(config(), counts.rows()[name])
    for key, value in now.items():
        assert stored[name][key] == pytest.approx(value, rel=0.02), key
