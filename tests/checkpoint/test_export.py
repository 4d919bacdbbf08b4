"""Which checkpoint an export takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sparsity.tokens.mass import Threshold
from tests.checkpoint.test_checkpoint import PLAIN, save
from tests.support.journals import write
from trainer.checkpoint.export import export
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.model import thresholds
from trainer.model.thresholds import Thresholds, write_to_run


def test_of_several_best_of_one_step_the_newest_is_exported(tmp_path: Path) -> None:
    """As a crash leaves them: the step was saved again after a resume, and the older folder is not yet removed."""
    folder, config, out = tmp_path / "checkpoints", parse(PLAIN), tmp_path / "w.safetensors"
    old = save(folder, config, 5, best=0.9, best_step=5)
    shutil.copytree(old, tmp_path / "old")
    assert save(folder, config, 5, best=0.9, best_step=5, chain="cd").name == "step-00000005.2"
    shutil.copytree(tmp_path / "old", old)
    save(folder, config, 6, best=0.9, best_step=5, chain="ef")
    shutil.copytree(tmp_path / "old", old, dirs_exist_ok=True)
    about = [export(tmp_path, out, which).about for which in ("best", "latest", "step-00000005")]
    assert [(a["step"], a["chain"]) for a in about] == [("5", "cd"), ("6", "ef"), ("5", "ab")]


def test_without_an_evaluation_there_is_no_best(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", parse(PLAIN), 5)
    with pytest.raises(ConfigError, match=r"--checkpoint best: no evaluated checkpoint was kept .*use latest"):
        export(tmp_path, tmp_path / "w.safetensors", "best")


TOKENS = {"method": "topk", "keep": 0.5, "blocks": [1], "position": "block"}
SMALL = {"name": "deit_tiny_patch16_224", "args": {"embed_dim": 24, "depth": 3, "num_heads": 3}}
PLAN = {"method": "dense_sparse", "densities": [0.35, 0.7]}


def test_the_header_has_the_densities_of_the_training_and_of_its_top1(tmp_path: Path) -> None:
    config = parse(PLAIN | {"model": SMALL, "tokens": TOKENS, "plan": PLAN})
    save(tmp_path / "checkpoints", config, 5)
    scored = {"kind": "eval", "time": 1.0, "attempt": 0, "epoch": 1, "step": 5, "progress": 1.0, "ema": False, "top1": 0.75}
    write(tmp_path, [scored | {"images": 4, "per_class": [], "keep_tokens": 0.5, "keep_connections": 1.0}])
    found = export(tmp_path, tmp_path / "w.safetensors")
    assert json.loads(found.about["densities"]) == [0.35, 0.7, 1.0] and found.about["top1_density"] == "0.5"
    assert "top-1 75.00 % at density 0.5" in found.text() and "thresholds" not in found.text()


def test_thresholds_that_are_not_of_the_exported_weights_are_named(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", parse(PLAIN | {"model": SMALL, "tokens": TOKENS}), 5)
    write_to_run(tmp_path, Thresholds("other", 1, "cls", 16, 500, {0.5: Threshold(0.7, 0.5), 0.7: Threshold(0.8, 0.7)}))
    found = export(tmp_path, tmp_path / "w.safetensors")
    assert thresholds.HEADER not in found.about
    assert found.text().endswith(
        f"thresholds left out: {tmp_path}/thresholds.json was calibrated for other weights than the raw weights of step 5; run trilevel "
        f"calibrate {tmp_path}/w.safetensors {tmp_path}/config.yaml --density 0.5,0.7"
    )
