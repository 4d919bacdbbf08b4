"""Weights of a network with another number of heads, which have the same shapes: refused wherever something tells the number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from tests.support import images as drawn
from trainer.config.errors import ConfigError
from trainer.config.schema import ModelConfig
from trainer.model import weights
from trainer.model.build import build_model
from trainer.model.heads import heads
from trainer.model.teacher import build_teacher

NAME = "deit_tiny_patch16_224"
SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
OTHER = SMALL | {"num_heads": 6}


def settings(init: Any = "random", **args: Any) -> ModelConfig:
    return ModelConfig(name=NAME, classes=4, image_size=16, init=str(init), args=SMALL | args)


def run_of(folder: Path, header: dict[str, str] | None = None) -> Path:
    """A run of a network of 3 heads, without a journal."""
    folder.mkdir(parents=True)
    config = drawn.config("nowhere", model={"name": NAME, "classes": 4, "image_size": 16, "args": SMALL})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.resolved()))
    weights.save_weights(folder / "weights.safetensors", weights.create(settings()).state_dict(), header)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "runs" / "dense")


def test_a_run_and_its_files_tell(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.safetensors").write_bytes((run / "weights.safetensors").read_bytes())
    for source in (run, run / "weights.safetensors", checkpoint / "weights.safetensors"):
        assert weights.create(settings(source)) is not None
        with pytest.raises(
            ConfigError,
            match=rf"model.init={source}: its network has 3 heads in attention 0, this one 6; .*set model.args.num_heads=3",
        ):
            weights.create(settings(source, num_heads=6))


def test_the_header_of_our_files_tells_and_a_foreign_file_does_not(tmp_path: Path) -> None:
    state, ours, foreign = weights.create(settings()).state_dict(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    weights.save_weights(ours, state, {"model": NAME, "args": json.dumps(SMALL)})
    weights.save_weights(foreign, state)
    with pytest.raises(ConfigError, match="its network has 3 heads in attention 0, this one 6"):
        weights.create(settings(ours, num_heads=6))
    assert heads(weights.create(settings(foreign, num_heads=6))) == [6, 6], "nothing tells"


def test_timms_name_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **args: plain(name, **args))
    timms = ModelConfig(name=NAME, classes=1000, init="timm", args={"num_heads": 6})
    with pytest.raises(ConfigError, match=r"model.init=timm: its network has 3 heads in attention 0, this one 6"):
        weights.create(timms)
    assert weights.create(timms.model_copy(update={"args": {}})) is not None


def test_a_teacher_with_another_number_of_heads_is_refused(run: Path) -> None:
    file = run / "weights.safetensors"
    for source, args in ((run, {"args": OTHER}), (file, {"args": OTHER})):
        config = drawn.config(
            "nowhere",
            model={"name": NAME, "classes": 4, "image_size": 16, "args": OTHER},
            teacher={"from": str(source), "logits": "soft"} | args,
        )
        with pytest.raises(ConfigError, match=r"teacher.from=.*3 heads .*, this one 6; .*set teacher.args.num_heads=3"):
            build_teacher(config, build_model(config), frozenset())


def test_evaluation_of_a_run_with_another_number_of_heads_is_refused(run: Path) -> None:
    from trainer.analysis.evaluation.scored_model import scored_model

    config = drawn.config("nowhere", model={"name": NAME, "classes": 4, "image_size": 16, "args": OTHER})
    with pytest.raises(ConfigError, match=rf"eval {run}: its network has 3 heads"):
        scored_model(str(run), config, [], "eval")
    assert scored_model(str(run), None, [], "eval").network is not None
