"""How many graphs torch.compile makes in a whole run: one for training and one for evaluation under each plan, none for anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, lines

WORDS = [
    "model.image_size=32", "model.args={embed_dim: 24, depth: 4, num_heads: 3, patch_size: 8}", "model.classes=10",
    "tokens.blocks=[1, 2, 3]",
    "data.batch=144", "data.micro_batch=144", "data.lanes=4", "data.window=64", "data.workers=0", "data.repeats=1",
    "epochs=11", "plan.warmup=1ep", "plan.length=8ep", "examples.method=all", "optim.warmup=1ep", "control=0.9",
    "evaluate.batch=256", "checkpoint.every=0ep", "tracking.to=journal", "engine.precision=float32", "name=graphs",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipe_at_07_compiles_22_graphs(digits: Path, tmp_path: Path) -> None:
    """Its plan, 8 plateaus between dense and the last one, over 11 epochs of digits: a graph for training and one for evaluation each.
    Neither the last batch of an evaluation, which is shorter, nor the dense baseline has graphs of its own."""
    shards = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar"]
    job = [
        sys.executable,
        str(ROOT / "tests/support/jobs/graphs.py"),
        "train",
        str(ROOT / "configs/tri_level_deit_small_0.7.yaml"),
    ]
    done = subprocess.run(
        [*job, *shards, *WORDS], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run = tmp_path / "runs" / "graphs"
    plans = {(line["keep_tokens"], line["keep_connections"]) for line in lines(run, "plateau")}
    assert len(plans) == 10
    assert any("measured" in line for line in lines(run, "control")), "the dense baseline ran"
    graphs, breaks = json.loads(done.stdout.splitlines()[-1])
    assert (graphs, breaks) == (2 * len(plans) + 2, 0), "and one of images and targets, one of loss and bookkeeping"
