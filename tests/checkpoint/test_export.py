"""Which checkpoint an export takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.test_checkpoint import PLAIN, save
from trainer.checkpoint.export import export
from trainer.config.errors import ConfigError
from trainer.config.load import parse


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
