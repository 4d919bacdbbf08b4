"""`trilevel init` writes two configurations that pass `--check`, fit the data set and differ in the levels only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.images import write_shards
from trainer.__main__ import main
from trainer.config.load import load
from trainer.data.shards.index import build_index
from trainer.preflight.check import check
from trainer.preflight.data_survey import Survey
from trainer.preflight.first_config import choose, text


def found(images: int = 100_000, side: int = 64, labels: str = "cls") -> Survey:
    return Survey(
        "shards/x", "shards/x/train-*.tar", "shards/x/val-*.tar", labels, images, 9, (1, 2.5, 4), 20, side, side, side
    )


@pytest.fixture
def init(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `trilevel init WORDS` in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["init", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_both_configurations_pass_the_check_and_differ_in_the_levels_only(init: Any, digits: Path) -> None:
    code, out, _ = init(digits, "--out", "mine/digits.yaml")
    assert code == 0 and "1438 training and 359 validation images, 10 classes" in out and "8 x 8 pixels (median)" in out
    ours, dense = (yaml.safe_load(Path("mine", name).read_text()) for name in ("digits.yaml", "digits_dense.yaml"))
    assert ours["model"]["args"]["embed_dim"] == 96 and ours["model"]["classes"] == 10
    assert ours["data"]["lanes"] and ours["model"]["image_size"] == 32 and ours["data"]["batch"] == 64
    levels = {"examples", "tokens", "connections", "plan"}
    assert levels <= ours.keys() and not levels & dense.keys() and dense["control"] == 0
    levels |= {"control"}
    assert {k: v for k, v in ours.items() if k not in levels | {"name"}} == {
        k: v for k, v in dense.items() if k not in levels | {"name"}
    }
    reports = [check(load(Path("mine", name)), world=2) for name in ("digits.yaml", "digits_dense.yaml")]
    assert reports[0].share() < 0.9 and reports[1].share() == 1
    for key in ("batch", "micro_batch", "workers", "lr", "epochs", "image_size"):
        line = next(line for line in Path("mine/digits.yaml").read_text().splitlines() if line.strip().startswith(f"{key}:"))
        assert "  # " in line, "every choice has its reason beside it"
    code, _, err = init(digits, "--out", "mine/digits.yaml")
    assert code == 2 and "exists; remove it, or write another file with --out" in err


@pytest.mark.parametrize("images", [10, 39, 40, 150, 1438, 19_999, 50_000, 199_999, 1_281_167])
@pytest.mark.parametrize("side", [8, 32, 64, 100, 375])
def test_every_size_gives_a_valid_configuration(tmp_path: Path, images: int, side: int) -> None:
    chosen = choose(survey := found(images, side), cores=2, devices=0)
    for dense in (False, True):
        path = tmp_path / ("a_dense.yaml" if dense else "a.yaml")
        path.write_text(text(survey, chosen, Path("a.yaml"), Path("a_dense.yaml"), dense=dense, gpu=images > 150))
        config = load(path)
        assert config.data.batch <= images and config.model.image_size % chosen.patch == 0
        assert config.optim.warmup < config.epochs and config.examples.settings.left_out == (
            0.1 if images >= 40 and not dense else 0
        )
        assert max(map(len, path.read_text().splitlines())) <= 160


def test_the_choices_follow_the_data_set() -> None:
    imagenet, tiny = choose(found(1_281_167, 375), cores=64, devices=8), choose(found(100_000, 64), cores=2, devices=0)
    assert (imagenet.model, imagenet.image_size, imagenet.batch, imagenet.epochs, imagenet.workers) == (
        "deit_small_patch16_224", 224, 1024, 300, 7,
    )  # fmt: skip
    assert (tiny.model, tiny.image_size, tiny.patch, tiny.batch, tiny.workers) == ("deit_tiny_patch16_224", 64, 8, 512, 1)


@pytest.mark.parametrize("epochs", [2, 3, 4, 30])
def test_lengths_follow_the_epochs(init: Any, digits: Path, epochs: int) -> None:
    assert init(digits, "--out", "a.yaml", "--epochs", epochs)[0] == 0
    config = load("a.yaml")
    assert check(config, world=1).plateaus[-1].stretch.end == epochs == config.epochs
    assert config.plan.settings.borders(epochs)[-1] <= epochs
    assert config.optim.warmup == {2: 0.2, 3: 0.3, 4: 0.4, 30: 3.0}[epochs], "the default of a configuration without the key"
    if epochs < 4:
        assert config.examples.settings.left_out == 0
    else:
        settings: Any = config.examples.settings
        assert settings.left_out and settings.window * settings.updates < epochs, "every update acts on an epoch"


def test_shards_of_others_with_their_labels(init: Any, tmp_path: Path) -> None:
    for stem in ("theirs-train", "theirs-val"):
        build_index(write_shards(tmp_path / "theirs", [20, 20], stem=stem), progress=False)
    code, out, _ = init("theirs")
    assert code == 0 and "40 training and 40 validation images, 4 classes" in out
    config = load("theirs.yaml")
    assert (config.data.train, config.data.validation) == ("theirs/theirs-train-*.tar", "theirs/theirs-val-*.tar")
    assert check(config, world=1).images == 40


def test_what_is_missing_is_named(init: Any, tmp_path: Path) -> None:
    write_shards(tmp_path / "a", [8], stem="train")
    assert "no training shards with an index (found: none)" in init("a")[2]
    build_index("a/train-*.tar", progress=False)
    code, _, err = init("a")
    assert (
        code == 2
        and "no validation shards with an index (found: train); pack them: trilevel pack SRC a --name validation" in err
    )
    assert "not a folder" in init("nowhere")[2] and not list(tmp_path.glob("*.yaml"))
    build_index(write_shards(tmp_path / "a", [8], stem="val"), progress=False)
    assert (
        "must end with .yaml" in init("a", "--out", "x.json")[2] and "--epochs 1: must be >= 2" in init("a", "--epochs", 1)[2]
    )
