"""`bench inference`: rows at equal multiply-adds, and the drawn token counts of the adaptive rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import images as drawn
from trainer.__main__ import main
from trainer.bench import inference
from trainer.config.errors import ConfigError

MODEL = {"image_size": 32, "args": {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}}


def config(**tokens: Any) -> Any:
    about = {"method": "topk", "keep": 0.5, "blocks": [1], "position": "block"} | tokens
    return drawn.config("nowhere", tokens=about).changed(model=MODEL)


def test_every_row_is_measured_and_peers_have_the_multiply_adds_of_topk() -> None:
    found = inference.bench(config(), 0.45, [1, 4], rounds=2).rows
    names = ["timm", "ours dense", "topk 0.45", "mass 0.45, packed", "mass 0.45, padded", "EViT", "ToMe"]
    assert list(found) == [f"{batch} x {name}" for batch in (1, 4) for name in names]
    for batch in (1, 4):
        topk = found[f"{batch} x topk 0.45"]
        assert found[f"{batch} x ours dense"]["peak_mib"] <= found[f"{batch} x timm"]["peak_mib"], "nothing is held longer"
        assert topk["tokens"] == 30 and found[f"{batch} x timm"]["bound"] == 1.0
        for name in ("EViT", "ToMe", "mass 0.45, packed"):
            assert found[f"{batch} x {name}"]["gmacs"] == pytest.approx(topk["gmacs"], rel=0.05)
        assert all(row["images_per_second"] > 0 and row["peak_mib"] > 0 for row in found.values())


@pytest.mark.parametrize("batch", [1, 2, 32, 256])
@pytest.mark.parametrize("mean", [10, 20, 88, 177, 190, 196])
def test_drawn_counts_have_the_wanted_mean(batch: int, mean: int) -> None:
    counts = inference._counts(batch, mean, 196)
    assert float(counts.double().mean()) == mean
    assert batch < 32 or mean in (10, 196) or len(counts.unique()) > 5
    assert torch.equal(counts, inference._counts(batch, mean, 196))
    assert counts.max() <= 196 and counts.min() >= min(16, mean), "an image has no more tokens than patches"


def test_the_command_and_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    import yaml

    Path("c.yaml").write_text(yaml.safe_dump(config().resolved()))
    assert main(["bench", "inference", "c.yaml", "--batches", "2", "--rounds", "2", "--json", "o.json"]) == 0
    assert "speedup over timm" in " ".join(capsys.readouterr().out.split()) and "2 x ToMe" in json.loads(
        Path("o.json").read_text()
    )
    assert main(["bench", "inference", "c.yaml", "--batches", "0"]) == 2
    assert "--batches 0: must be integers >= 1" in capsys.readouterr().err
    for part, option in (("inference", "--rounds"), ("step", "--pairs"), ("checkpoint", "--saves")):
        assert main(["bench", part, "c.yaml", option, "0"]) == 2
        assert f"bench {part}: {option} 0: must be >= 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--density 1: must be in \(0, 1\)"):
        inference.bench(config(), 1.0, [1], 1)
    with pytest.raises(ConfigError, match=r"tokens.blocks=\[1, 2\]: give one early block"):
        inference.bench(config(blocks=[1, 2]), 0.5, [1], 1)
