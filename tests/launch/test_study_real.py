"""A study of two arms and two seeds on digits, from `launch study` to its page, then again with nothing left to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.analysis.history import history

CONFIG = """
name: mini
epochs: 2
control: 0
log_every: 1ep
model: {{name: deit_tiny_patch16_224, classes: 10, image_size: 32, args: {{patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}}}}
data:
  train: '{shards}/train-*.tar'
  validation: '{shards}/validation-*.tar'
  batch: 96
  micro_batch: 96
  workers: 0
  lanes: 4
  window: 64
augment: {{crop: none, flip: 0.0}}
optim: {{lr: 2.0e-3, warmup: 1ep}}
engine: {{kind: ddp, precision: float32}}
evaluate: {{every: 1ep, crop_pct: 1.0}}
checkpoint: {{every: 0ep}}
tracking: {{to: journal}}
"""
STUDY = """
name: mini
question: Does half of the examples matter?
config: mini_base.yaml
reference: dense
seeds: [0, 1]
arms: {dense: {}, half: {examples: {method: random_epoch, removed: 0.5}}}
"""


@pytest.mark.slow
def test_a_study_from_its_file_to_its_page(tmp_path: Path, digits: Path) -> None:
    (tmp_path / "mini_base.yaml").write_text(CONFIG.format(shards=digits))
    (tmp_path / "mini.yaml").write_text(STUDY)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def call(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    study = ("launch", "study", "mini.yaml", "--jobs", "2", "--journals", "kept")
    out = call(*study)
    assert out.count("ended with 0") == 4 and out.count(" finished ") == 4
    kept = sorted(path.name for path in (tmp_path / "kept" / "mini").iterdir())
    assert kept == [f"{arm}-seed{seed}.jsonl.xz" for arm in ("dense", "half") for seed in (0, 1)]
    half = history(tmp_path / "kept" / "mini" / "half-seed1.jsonl.xz")
    assert half.status == "finished" and half.config["seed"] == 1 and half.config["examples"]["removed"] == 0.5
    assert [point.images for point in half.of("eval")] == [672, 1344]  # counted up to each evaluation: 7 of 14 batches an epoch
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert "started" not in call(*study)
    call("trainer", "compare", "--study", "mini.yaml", "--journals", "kept", "--out", "study.md")
    text = (tmp_path / "study.md").read_text()
    assert "| half | 0, 1 |" in text and "| half | dense | 2 |" in text and "other settings" not in text
    assert str(tmp_path) not in text and "4 runs on 1 x CPU" in text
