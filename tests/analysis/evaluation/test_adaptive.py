"""From training images to thresholds, from thresholds to another number of tokens per image, and into an exported file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from sparsity.build import build
from sparsity.tokens.mass import Threshold
from sparsity.tokens.topk import TopKSettings
from sparsity.types import DENSE, Plan
from tests.support.sait import ARGS, WEIGHTS, write
from trainer import load_model
from trainer.__main__ import main
from trainer.analysis.evaluation import teacher_agreement
from trainer.analysis.evaluation.adaptive_model import adaptive_model
from trainer.analysis.evaluation.calibrate import calibrate
from trainer.analysis.evaluation.densities import score
from trainer.analysis.evaluation.passes import ChosenPasses
from trainer.analysis.evaluation.scored_model import scored_model
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.augment.on_device import normalise
from trainer.data.loader.build import clean_images
from trainer.data.shards.index import open_index
from trainer.model import thresholds
from trainer.model.thresholds import Thresholds
from trainer.model.weights import save_weights


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path)


def pixels(config: Config, ids: list[int]) -> torch.Tensor:
    (batch,) = list(clean_images(open_index(config.data.train), config, 0, 1, 1.0).of(np.array(ids)))
    return normalise(batch.images[: len(ids)], config.augment)


def test_thresholds_keep_the_wanted_mean_and_stay_with_the_weights(config: Config, capsys: Any) -> None:
    before = {name: tensor.clone() for name, tensor in load_file(WEIGHTS).items()}
    assert main(["calibrate", WEIGHTS, "c.yaml", "--density", ".7,.5", "--json", "out.json"]) == 0
    assert main(["calibrate", WEIGHTS, "c.yaml", "--density", ".4"]) == 0  # the earlier ones stay
    found = thresholds.read(Path(WEIGHTS))
    assert found is not None and sorted(found.by_density) == [0.4, 0.5, 0.7] and (found.block, found.images) == (1, 39)
    for row in json.loads(Path("out.json").read_text())["rows"]:
        assert row["mean_density"] == found.by_density[row["density"]].density == pytest.approx(row["density"], abs=0.01)
    assert thresholds.header(Path(WEIGHTS))["model"] == config.model.name, "the header keeps what it had"
    assert all(torch.equal(before[name], tensor) for name, tensor in load_file(WEIGHTS).items())
    assert "mean density kept" in capsys.readouterr().out


def test_densities_of_another_number_of_images_are_not_lost_without_a_word(config: Config) -> None:
    calibrate(WEIGHTS, config, [0.7, 0.45678912], images=20)
    with pytest.raises(
        ConfigError, match=r"densities 0\.45678912, 0\.7 were calibrated with \d+ images, now \d+; give --images"
    ):
        calibrate(WEIGHTS, config, [0.5], images=10)
    found = thresholds.read(Path(WEIGHTS))
    assert found is not None and sorted(found.by_density) == [0.45678912, 0.7] and found.mass(0.45678912) < 1
    calibrate(WEIGHTS, config, [0.7, 0.45678912], images=10)  # all of them again


def test_a_file_that_selects_elsewhere_is_not_calibrated_for_here(config: Config) -> None:
    header = thresholds.header(Path(WEIGHTS)) | {"tokens": json.dumps({"method": "topk", "blocks": [0]})}
    save_weights(Path(WEIGHTS), load_file(WEIGHTS), header)
    with pytest.raises(
        ConfigError, match=r"its header has tokens\.blocks=\[0\], the configuration \[1\]; leave out tokens\.blocks"
    ):
        calibrate(WEIGHTS, config, [0.5])


def test_training_images_are_calibrated_on_and_the_broken_one_is_not(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr(
        "trainer.data.loader.calibration.clean_images",
        lambda index, *_: shown.append(len(index)) or clean_images(index, *_),
    )
    found = calibrate(WEIGHTS, config, [0.5], images=10)
    again = calibrate(WEIGHTS, config, [0.5], images=10)
    assert found.found == again.found and found.found.images in (9, 10) and shown == [40, 40]


def test_one_evaluation_has_value_based_mass_based_and_random_tokens(config: Config) -> None:
    calibrate(WEIGHTS, config, [0.5])
    assert (
        main(["eval", WEIGHTS, "c.yaml", "--densities", "1,.5", "--adaptive", "--random", "--json", "o.json", "--plots", "p"])
        == 0
    )
    rows = json.loads(Path("o.json").read_text())["rows"]
    assert [(row["selection"], row["density"]) for row in rows] == [
        ("topk", 1.0),
        ("topk", 0.5),
        ("mass", 0.5),
        ("random", 0.5),
    ]
    dense, value, mass, random = rows
    assert dense["tokens"] == 65 and value["tokens"] == value["p50"] == value["p95"] == random["tokens"] == 33
    assert mass["tokens"] == pytest.approx(33, abs=0.5) and mass["p95"] > mass["p50"], "as many on average, others per image"
    assert dense["gmacs"] > value["gmacs"] and mass["gmacs"] == pytest.approx(value["gmacs"], rel=0.02)
    assert all(row["images_per_second"] > 0 for row in rows)
    assert sorted(path.name for path in Path("p").iterdir()) == ["densities.png", "images.png"]


def test_the_rows_are_those_of_each_image_alone(config: Config) -> None:
    """The adaptive row against a loop over single images, counts and predictions."""
    calibrate(WEIGHTS, config, [0.5])
    found = score(WEIGHTS, config, [1.0, 0.5], adaptive=True)
    assert found.extremes is not None
    _, network, source = scored_model(WEIGHTS, config, [], "eval")
    adaptive = adaptive_model(config, network.eval(), execution="per_image")
    limit = thresholds.read(Path(WEIGHTS))
    assert source is not None and limit is not None
    index = open_index(config.data.validation)
    ids = [i for i in range(len(index)) if i != 9]
    single = [adaptive(pixels(config, [i]), limit.mass(0.5)) for i in ids]
    counts = [int(one.counts) for one in single]
    right = [int(one.logits.argmax()) == int(index.labels[i]) for i, one in zip(ids, single, strict=True)]
    row = found.rows[-1]
    assert row.tokens == pytest.approx(1 + np.mean(counts)) and row.scores.top1 == pytest.approx(np.mean(right))
    assert found.extremes.fewest[0].count == min(counts) and found.extremes.most[0].count == max(counts)
    assert [len(one.kept) for one in found.extremes.most] == [one.count for one in found.extremes.most]


def test_few_images_are_named_and_so_is_another_density_than_the_rows(config: Config, capsys: Any) -> None:
    assert main(["calibrate", WEIGHTS, "c.yaml", "--density", ".5", "--images", "1", "--json", "o.json"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 images are few: other images may keep another mean density; data.train has 40" in shown
    assert (
        "data.train has the same shards as data.validation" in shown
        and len(json.loads(Path("o.json").read_text())["notes"]) == 2
    )
    found = score(WEIGHTS, config, [0.5], adaptive=True)
    kept = (found.rows[1].tokens - 1) / 64
    assert abs(kept - 0.5) > 0.02, "one image tells nothing about forty"
    assert found.notes == (
        f"mass 0.5: these images keep {kept:.2f} of the patches on average; the threshold was found with 1 training images, calibrate "
        "with more, or with images like these",
    )
    assert found.facts()["notes"] == list(found.notes)


def test_a_density_that_cannot_be_is_refused_before_the_images_are_read(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.analysis.evaluation.calibrate.calibration_images", lambda *_: pytest.fail("images were read"))
    with pytest.raises(ConfigError, match="less than the 16 that every image keeps"):
        calibrate(WEIGHTS, config, [0.5, 0.1])


def _with_header(**more: Any) -> None:
    header = thresholds.header(Path(WEIGHTS)) | {key: json.dumps(value) for key, value in more.items()}
    save_weights(Path(WEIGHTS), load_file(WEIGHTS), header)


def test_settings_under_which_the_weights_were_not_trained_are_notes(config: Config) -> None:
    own = {"mean": config.augment.mean, "std": config.augment.std}
    _with_header(pixels=own, densities=[0.5, 1.0])
    assert score(WEIGHTS, config, [1.0, 0.5]).notes == ()
    assert load_model(WEIGHTS).origin.densities == (0.5, 1.0)
    other = config.changed(augment={"mean": (0.4,) * 3, "std": (0.2,) * 3}, tokens={"blocks": (2,)})
    pixels, blocks, density = score(WEIGHTS, other, [0.4]).notes
    assert "mean [0.4, 0.4, 0.4] std [0.2, 0.2, 0.2]" in pixels and f"mean {list(config.augment.mean)}" in pixels
    assert blocks == "other tokens: these weights were trained with tokens.blocks=[1], this configuration has [2]"
    assert density == "density 0.4: outside of those in training, 0.5 to 1"
    (received,) = score(WEIGHTS, config.changed(tokens={"settings": TopKSettings(importance="received")}), [0.5]).notes
    assert received == "other tokens: these weights were trained with tokens.importance=cls, this configuration has received"


def test_thresholds_of_other_pixels_are_refused(config: Config) -> None:
    _with_header(pixels={"mean": [0.1] * 3, "std": [0.2] * 3})
    with pytest.raises(ConfigError, match=r"trained with mean \[0\.1, .*, augment has mean .*; leave out augment\.mean"):
        calibrate(WEIGHTS, config, [0.5])
    _with_header(pixels=[1])
    with pytest.raises(ConfigError, match=r"its header does not describe the training .*export it again"):
        calibrate(WEIGHTS, config, [0.5])


def test_an_exported_file_answers_at_any_density(config: Config) -> None:
    calibrate(WEIGHTS, config, [0.5])
    model = load_model(WEIGHTS)
    images = pixels(config, [0, 1, 2])
    plain = timm.create_model(config.model.name, num_classes=4, img_size=32, **ARGS, checkpoint_path=WEIGHTS).eval()
    _, network, _ = scored_model(WEIGHTS, config, [], "eval")
    with torch.no_grad():
        assert torch.equal(model(images), plain(images)) and torch.equal(model(images), network.eval()(images, DENSE).logits)
        assert torch.equal(model(images, density=0.5), network(images, Plan(0.5)).logits)
        mass = model(images, density=0.5, adaptive=True)
    assert not torch.allclose(mass, model(images, density=0.5)) and torch.allclose(
        model(images, 1.0, True), plain(images), atol=1e-5
    )
    for words, message in (
        ({"density": 0.0}, r"density=0: must be in \(0, 1\]"),
        ({"density": ".5"}, r"density='\.5': must be a number in \(0, 1\]"),
        ({"density": 0.6, "adaptive": True}, "density 0.6 has no mass threshold; calibrated: 0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            model(images, **words)
    for other, message in (
        (images[:, :1], r"images of shape \[3, 1, 32, 32\]: must be \(B, 3, 32, 32\)"),
        (images[:, :, :28], r"images of shape \[3, 3, 28, 32\]"),
        (images[0], r"images of shape \[3, 32, 32\]"),
        (images.double(), r"images of torch\.float64: must be torch\.float32 as the weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            model(other)


def test_thresholds_of_other_weights_another_block_or_score_are_refused(config: Config, capsys: Any) -> None:
    assert main(["eval", WEIGHTS, "c.yaml", "--densities", ".5", "--adaptive"]) == 2
    assert "has no mass thresholds; run trilevel calibrate" in capsys.readouterr().err
    calibrate(WEIGHTS, config, [0.5])
    for change, name in (("tokens.blocks=[2]", "tokens.blocks 1"), ("tokens.importance=received", "tokens.importance cls")):
        assert main(["eval", WEIGHTS, "c.yaml", change, "--densities", ".5", "--adaptive"]) == 2
        assert f"calibrated for {name}" in capsys.readouterr().err
    state = load_file(WEIGHTS)
    state["head.bias"] = state["head.bias"] + 1
    save_weights(WEIGHTS, state, thresholds.header(Path(WEIGHTS)))
    assert main(["eval", WEIGHTS, "c.yaml", "--densities", ".5", "--adaptive"]) == 2
    assert "calibrated for weights" in capsys.readouterr().err
    model = load_model(WEIGHTS)
    assert model(pixels(config, [0])).shape[0] == 1, "dense, it can be used all the same"
    with pytest.raises(ConfigError, match="calibrated for weights"):
        model(pixels(config, [0]), 0.5, adaptive=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate", WEIGHTS, "c.yaml", "--density", "1.2"], r"--density 1.2: must be keep ratios in (0, 1]"),
        (["calibrate", WEIGHTS, "c.yaml", "--density", ".1"], "less than the 16 that every image keeps; use at least 0.25"),
        (["calibrate", WEIGHTS, "c.yaml", "--density", ".5", "--images", "0"], "--images 0: must be >= 1"),
        (["calibrate", WEIGHTS, "c.yaml", "tokens.blocks=[0, 1]", "--density", ".5"], "exactly one pruning block"),
        (["calibrate", WEIGHTS, "c.yaml", "tokens.method=random", "--density", ".5"], "set tokens.method=topk"),
        (
            ["calibrate", WEIGHTS, "c.yaml", "tokens.fuse=true", "--density", ".5"],
            "mass-based selection does not fuse the tokens",
        ),
        (
            ["calibrate", "timm:deit_tiny_patch16_224", "c.yaml", "model.classes=1000", "--density", ".5"],
            "give a run directory",
        ),
        (["calibrate", "runs/nope", "--density", ".5"], "calibrate runs/nope: no such file; give a run directory"),
        (["eval", "runs/nope", "--densities", ".5"], "eval runs/nope: no such file; give a run directory, a weights file"),
        (
            ["eval", WEIGHTS, "c.yaml", "tokens.blocks=[3, 9]"],
            "trilevel: model.name=vit_tiny_patch16_224: tokens.blocks=[3, 9]",
        ),
        (
            ["eval", WEIGHTS, "c.yaml", "tokens.blocks=[0, 1]", "--densities", ".5", "--least"],
            "eval --least: tokens.blocks=[0, 1]: mass-based selection needs exactly one pruning block",
        ),
        (["eval", WEIGHTS, "c.yaml", "--densities", ""], "--densities '': must be keep ratios in (0, 1]"),
        (["eval", WEIGHTS, "c.yaml", "--densities", ".5,1,.5"], "--densities .5,1,.5: 0.5 is given twice"),
        (["calibrate", WEIGHTS, "c.yaml", "tokens.blocks=[3]", "--density", ".5"], "tokens would leave after the last block"),
        (["export", "run", "o.onnx", "--adaptive", "--density", ".5"], "ONNX has the same number of tokens for every image"),
        (["export", "run", "o.safetensors", "--adaptive"], "has the thresholds of trilevel calibrate in its header"),
        (["eval", WEIGHTS, "c.yaml", "evaluate.densities=[.5, .7, .5]"], "[0.5, 0.7, 0.5]: 0.5 is given twice"),
        (["eval", WEIGHTS, "c.yaml", "--adaptive"], "--adaptive: needs --densities with a keep ratio below 1"),
        (["eval", WEIGHTS, "c.yaml", "--densities", "1", "--random"], "--random: needs --densities with a keep ratio below 1"),
    ],
)
def test_what_cannot_be_is_refused(
    config: Config, words: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", _without_download)
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


_create = timm.create_model


def _without_download(*args: Any, pretrained: bool = False, **more: Any) -> Any:
    return _create(*args, **more)


OUTSIDE = Thresholds("hash", 1, "", 1, 1, {2.0: Threshold(1.0, 1.0)}).to_json()  # a density above 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weights": "x"}', OUTSIDE])
def test_damaged_thresholds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"RUN/thresholds\.json: no mass thresholds in it"):
        Thresholds.of_json(text, "RUN/thresholds.json")


def test_thresholds_survive_the_file() -> None:
    ours = Thresholds("hash", 2, "default", 16, 5000, {})
    assert Thresholds.of_json(ours.to_json(), "x") == ours
    assert replace(ours, block=3) != ours


def test_default_thresholds_of_earlier_versions_are_those_of_one_prefix_token(config: Config) -> None:
    calibrate(WEIGHTS, config, [0.5])
    found = thresholds.read(Path(WEIGHTS))
    assert found is not None and (found.importance, found.precision) == ("cls", "float32")
    older = json.dumps({k: v for k, v in json.loads(found.to_json()).items() if k != "precision"} | {"importance": "default"})
    save_weights(Path(WEIGHTS), load_file(WEIGHTS), thresholds.header(Path(WEIGHTS)) | {thresholds.HEADER: older})
    assert load_model(WEIGHTS)(pixels(config, [0]), 0.5, adaptive=True).shape == (1, 4)
    assert score(WEIGHTS, config, [0.5], adaptive=True).notes == ()


def test_a_file_of_an_earlier_version_with_several_prefix_tokens_keeps_its_score(config: Config, tmp_path: Path) -> None:
    """`default` was cls for a density and prefix for mass: the first stays, the second is refused beside it."""
    name, file = "deit_tiny_distilled_patch16_224", tmp_path / "two.safetensors"
    torch.manual_seed(2)
    network = timm.create_model(name, num_classes=4, img_size=32, **ARGS)
    network.blocks[1].attn.qkv.weight.data *= 12.0
    section = config.resolved()["tokens"]
    header = {"model": name, "classes": "4", "image_size": "32", "args": json.dumps(ARGS), "tokens": json.dumps(section)}
    assert section["importance"] == "default"
    older = Thresholds(
        thresholds.weights_hash(network.state_dict()), 1, "default", 16, 39, {0.5: Threshold(0.9, 0.5)}
    ).to_json()
    save_weights(file, network.state_dict(), header | {thresholds.HEADER: older})
    images, model = pixels(config, [0, 1, 2]), load_model(file)
    by = {
        one: build(network.eval(), tokens=TopKSettings(importance=one), blocks=(1,), position="block")
        for one in ("cls", "prefix")
    }
    with torch.no_grad():
        assert torch.equal(model(images, 0.5), by["cls"](images, Plan(0.5)).logits)
        assert not torch.equal(model(images, 0.5), by["prefix"](images, Plan(0.5)).logits)
    with pytest.raises(
        ConfigError, match=rf"{file}: calibrated for tokens.importance prefix, this model has cls; run trilevel"
    ):
        model(images, 0.5, adaptive=True)
    save_weights(
        file,
        network.state_dict(),
        header | {"tokens": json.dumps(section | {"importance": "prefix"}), thresholds.HEADER: older},
    )
    assert load_model(file)(images, 0.5, adaptive=True).shape == (3, 4)


def test_a_run_with_bf16_between_blocks_is_evaluated_on_a_cpu(config: Config) -> None:
    narrow = config.changed(engine={"residual": "bf16", "precision": "autocast"})
    assert calibrate(WEIGHTS, narrow, [0.5]).found.precision == "float32"
    rows = score(WEIGHTS, narrow, [1.0, 0.5], adaptive=True, random=True).rows
    assert [row.scores.top1 for row in rows] == [
        row.scores.top1 for row in score(WEIGHTS, config, [1.0, 0.5], adaptive=True, random=True).rows
    ]


def test_thresholds_of_another_precision_are_named_below_the_table(config: Config, capsys: Any) -> None:
    calibrate(WEIGHTS, config, [0.5])
    found = thresholds.read(Path(WEIGHTS))
    assert found is not None
    text = replace(found, precision="bf16 autocast").to_json()
    save_weights(Path(WEIGHTS), load_file(WEIGHTS), thresholds.header(Path(WEIGHTS)) | {thresholds.HEADER: text})
    assert main(["eval", WEIGHTS, "c.yaml", "--densities", ".5", "--adaptive"]) == 0
    assert "thresholds were found in bf16 autocast, these passes are float32" in " ".join(capsys.readouterr().out.split())


def test_a_teacher_with_other_prefix_tokens_or_patches_is_refused(config: Config) -> None:
    for name, args, message in (
        ("deit_tiny_distilled_patch16_224", ARGS, "it has 2 prefix tokens, weights.safetensors 1; give"),
        (
            config.model.name,
            ARGS | {"patch_size": 8},
            r"its patch grid is \(4, 4\), that of weights.safetensors \(8, 8\); give",
        ),
    ):
        Path("other").mkdir(exist_ok=True)
        network = timm.create_model(name, num_classes=4, img_size=32, **args)
        save_weights(Path("other/weights.safetensors"), network.state_dict())
        theirs = config.changed(model={"name": name, "args": args})
        Path("other/config.yaml").write_text(yaml.safe_dump(theirs.resolved()))
        with pytest.raises(ConfigError, match=f"--teacher other: {message}"):
            teacher_agreement.agreement(WEIGHTS, "other", config)


def test_other_orders_of_the_same_tokens_are_rows_for_comparison(config: Config) -> None:
    names = lambda found: [(row.selection, row.density) for row in found.rows]  # noqa: E731
    found = score(WEIGHTS, config, [1.0, 0.5], least=True, teacher=WEIGHTS)
    assert names(found) == [("topk", 1.0), ("topk", 0.5), ("least", 0.5), ("teacher", 0.5)]
    assert {row.tokens for row in found.rows[1:]} == {33.0} and len({row.gmacs for row in found.rows[1:]}) == 1
    _, network, _ = scored_model(WEIGHTS, config, [], "eval")
    adaptive, images = adaptive_model(config, network.eval()), pixels(config, [0, 1, 2])
    plan, order = Plan(0.5), adaptive.ranked(images)[1].order
    own, least = (ChosenPasses("x", adaptive, plan, by).run(images).logits for by in (lambda _, o: o, lambda _, o: o.flip(1)))
    assert torch.allclose(own, network(images, plan).logits, atol=1e-5)
    kept_last = torch.full((3,), 32)
    assert torch.equal(least, adaptive.finish(adaptive.ranked(images)[0], order.flip(1), kept_last).logits)


def test_the_agreement_with_a_teacher_is_spearmans(config: Config, capsys: Any) -> None:
    from scipy.stats import spearmanr

    g = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(3, 20, generator=g), (torch.rand(3, 20, generator=g) * 4).round()  # with ties
    wanted = [spearmanr(a, b).statistic for a, b in zip(ours.numpy(), theirs.numpy(), strict=True)]
    assert teacher_agreement.spearman(ours, theirs).tolist() == pytest.approx(wanted)
    assert teacher_agreement.spearman(ours, ours.exp()).tolist() == pytest.approx([1.0] * 3)
    assert main(["eval", WEIGHTS, "c.yaml", "--teacher", WEIGHTS]) == 0
    assert f"with the attention of {WEIGHTS}: " in " ".join(capsys.readouterr().out.split())
    assert abs(teacher_agreement.agreement(WEIGHTS, WEIGHTS, config)) < 0.9  # block 1 of 4 against the last one
