"""`bench engine`: its advice, what it refuses, and the whole of it on two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.bench.engine import advice, bench
from trainer.config.errors import ConfigError
from trainer.config.load import parse

RECIPE = """
name: tiny
epochs: 4
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32, args: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}}
data: {train: x, validation: x, batch: 128, micro_batch: 32}
optim: {warmup: 1ep, clip: 1.0}
tokens: {method: topk, keep: 0.7, blocks: [1]}
engine: {precision: float32}
"""


def config(**engine: object):
    about = {
        "name": "t",
        "model": {"name": "deit_tiny_patch16_224"},
        "data": {"train": "x", "validation": "x"},
        "engine": engine,
    }
    return parse(about)


def rows(**ratios: float) -> dict[str, dict[str, float]]:
    return {f"{name}@32": {"ratio": ratio} for name, ratio in ratios.items()}


def test_the_advice_names_what_the_engine_costs_and_the_keys_of_a_better_one() -> None:
    message = advice(config(zero=1), rows(ddp=1.03, zero0=1.1, zero1=1.2), 32)
    assert message == (
        "32 images per device: this model fits without sharding; step time relative to the bare loop: "
        "DDP 1.03 x, ZeRO 0 1.10 x, ZeRO 1 1.20 x; set engine.kind=ddp"
    )
    assert "ZeRO 1, as configured, is among the fastest" in advice(config(zero=1), rows(ddp=1.0, zero1=1.01), 32)
    assert "set engine.zero=2" in advice(config(zero=1), rows(zero2=1.5), 32)
    assert advice(config(zero=1), {}, 32) == "32 images per device: no engine could be measured"


def test_an_unknown_row_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="--rows: unknown value 'zero4'; valid values: bare, torch_ddp, ddp, zero0"):
        bench(config(), [2], only=["zero4"])


@pytest.mark.dist
@pytest.mark.slow
def test_it_measures_every_engine_on_every_device(trilevel: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    done = trilevel(1, "bench", "engine", "tiny.yaml", "--images-per-device", "4,2", "--rounds", "3", "--json", "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == [
        f"{row}@{n}" for n in (4, 2) for row in ("bare", "torch_ddp", "ddp", "zero0", "zero1", "zero2", "zero3")
    ]
    for row in found.values():
        assert 0 < row["min"] <= row["median"] <= row["max"] and row["unit"] == "ms" and row["ratio"] > 0
    assert found["bare@4"]["ratio"] == 1.0
    text = done.stdout  # type: ignore[attr-defined]
    assert "2 process(es)" in text and "4 images per device: this model fits" in text
