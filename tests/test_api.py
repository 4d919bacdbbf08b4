"""The Python API: the lines of the README, on shards of digits, in one process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import timm
import torch

import trainer
from trainer import compare, evaluate, load_config, load_weights, read_run, run_training

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in this process, one after the other."""
    folder = tmp_path_factory.mktemp("api")
    shards = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar", "data.workers=0"]
    words = [
        *shards,
        f"runs={folder}",
        "epochs=2",
        "optim.warmup=0ep",
        "plan.warmup=0ep",
        "plan.length=1ep",
        "tracking.to=journal",
    ]
    handler = signal.getsignal(signal.SIGTERM)
    for name in ("first", "second"):
        config = load_config(ROOT / "configs" / "quickstart.yaml", *words, name=name, seed=0 if name == "first" else 1)
        result = run_training(config)
        assert (result.status, result.directory) == ("finished", folder / name)
        assert signal.getsignal(signal.SIGTERM) is handler
    return folder


def test_a_run_as_data_frames(runs: Path):
    run = read_run(runs / "first")
    steps, evals = run["step"], run["eval"]
    assert list(evals["epoch"])[-1] == 2 and evals["images"].eq(359).all()
    assert steps["loss"].notna().all() and steps["step"].is_monotonic_increasing
    assert "kind" not in steps


def test_a_finished_run_is_evaluated_again_and_loads_into_timm(runs: Path):
    rows = evaluate(runs / "first")
    assert rows["top1"].item() == pytest.approx(read_run(runs / "first")["eval"]["top1"].iloc[-1])
    two = evaluate(runs / "first", None, [1.0, 0.7])
    assert list(two["density"]) == [1.0, 0.7]
    model = load_weights(runs / "first")
    assert isinstance(model, timm.models.vision_transformer.VisionTransformer) and not model.training
    size = load_config(runs / "first").model.image_size
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 10)


def test_two_seeds_are_one_row(runs: Path):
    table = compare(runs / "first", runs / "second")
    assert len(table) == 1 and table["seeds"].iloc[0] == "0, 1"


def test_names_are_there_and_others_are_not():
    assert set(trainer.__all__) <= set(dir(trainer.api))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        trainer.trian  # noqa: B018


def test_weights_of_no_run(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no weights\.safetensors"):
        load_weights(tmp_path)
