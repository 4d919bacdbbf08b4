"""How many graphs torch.compile makes in a whole run: one for training and one for evaluation for each set of token and key counts that a
plan gives, and two small ones; none for anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsity.types import Plan
from tests.conftest import ROOT, environment, lines
from trainer.config.load import load
from trainer.model.build import build_model, build_schedule

RECIPE = ROOT / "configs/tri_level_deit_small_0.7.yaml"
WORDS = [
    "model.image_size=32", "model.args={embed_dim: 24, depth: 4, num_heads: 3, patch_size: 8}", "model.classes=10",
    "tokens.blocks=[1, 2, 3]",
    "data.batch=144", "data.micro_batch=144", "data.lanes=4", "data.window=64", "data.workers=0", "data.repeats=1",
    "epochs=10", "plan.warmup=1ep", "plan.length=7ep", "examples.method=all", "optim.warmup=1ep", "control=0.9",
    "evaluate.batch=256", "checkpoint.every=0ep", "tracking.to=journal", "engine.precision=float32", "name=graphs",
]  # fmt: skip


@pytest.mark.parametrize(("words", "counts"), [((), 9), (("connections.method=all",), 8)])
def test_the_recipe_at_07_has_nine_plans_of_other_counts_and_eight_without_connections(
    words: tuple[str, ...], counts: int
) -> None:
    """At its own size: so it compiles 2 x 9 + 2 graphs. Its first plateau keeps all 196 patches, but hides two keys of each query."""
    config = load(RECIPE, ["model.args={embed_dim: 24, num_heads: 3}", *words])
    model, plans = build_model(config), [stretch.plan for stretch in build_schedule(config).stretches()]
    assert len(set(plans)) == 9
    assert len({model.counts(plan) for plan in plans}) == counts
    if not words:
        row = f"| graphs of the .7 recipe at most 21 | {2 * counts + 2}: {2 * counts} of the network,"
        assert row in (ROOT / "docs/results/gpu.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_compiles_two_graphs_for_each_set_of_counts_and_two_more(digits: Path, tmp_path: Path) -> None:
    """The recipe's plan, 7 plateaus between dense and the last one, over 10 epochs of digits with 16 patches: a graph for training and one
    for evaluation each. Neither the last batch of an evaluation, which is shorter, nor the dense baseline has graphs of its own."""
    shards = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar"]
    job = [sys.executable, str(ROOT / "tests/support/jobs/graphs.py"), "train", str(RECIPE)]
    done = subprocess.run(
        [*job, *shards, *WORDS], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run = tmp_path / "runs" / "graphs"
    plans = {(line["keep_tokens"], line["keep_connections"]) for line in lines(run, "plateau")}
    model = build_model(load(RECIPE, [*shards, *WORDS]))
    counts = {model.counts(Plan(*plan)) for plan in plans}
    assert (len(plans), len(counts)) == (9, 8), "of so few patches the first plateau keeps all"
    assert any("measured" in line for line in lines(run, "control")), "the dense baseline ran"
    graphs, breaks = json.loads(done.stdout.splitlines()[-1])
    assert (graphs, breaks) == (2 * len(counts) + 2, 0), "and one of images and targets, one of loss and bookkeeping"
