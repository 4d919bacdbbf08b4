"""`trilevel bench checkpoint` in its small form: times, sizes and shares of real saves, and nothing left in `runs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.bench.checkpoint import bench
from trainer.config.load import load

MODEL = "model.args={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}"


@pytest.mark.dist
def test_every_save_is_timed_and_its_files_are_deleted(digits: Path, tmp_path: Path) -> None:
    data = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar"]
    settings = [*data, MODEL, "tokens.blocks=[1]", "engine.kind=ddp", "engine.zero=0", "optim.ema=0.9", f"runs={tmp_path}"]
    found = bench(load(str(ROOT / "configs" / "quickstart.yaml"), settings), saves=3, examples=1000)
    assert found is not None and list(found.rows) == ["blocking", "writing", "bytes"]
    for row in found.rows.values():
        assert 0 < row["min"] <= row["median"] <= row["max"], "three values each, without the warm-up"
    weights = 4 * 16_000  # bytes, at least: weights, average and two moments of about 20,000 parameters
    assert found.rows["bytes"]["median"] * 2**20 > 4 * weights and found.rows["bytes"]["unit"] == "MiB"
    (note,) = found.notes
    blocking, writing = found.rows["blocking"]["median"], found.rows["writing"]["median"]
    assert f"{blocking / 3600:.4%}" in note and f"{(blocking + writing) / 3600:.4%}" in note
    assert not list(tmp_path.iterdir())
