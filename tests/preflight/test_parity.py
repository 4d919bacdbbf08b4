"""Our recipe against timm's own pieces over many steps: equal to the bit for dense recipes; elsewhere the first difference is named."""

import json
import random

import numpy as np
import pytest
from torch import nn

from tests.support.images import config as drawn_config
from tests.support.images import jpeg, write_shards, write_tar
from trainer.config.run_config import Config
from trainer.data.errors import DataError
from trainer.data.loader.build import training_stream
from trainer.data.shards.index import build_index
from trainer.model import optimizer as optim
from trainer.model.weights import create, save_weights
from trainer.preflight import parity
from trainer.preflight.parity import parity as run
from trainer.preflight.timm_recipe import _numpy_seeded

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2}
AUGMENT = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "erasing": 0.25,
    "color_jitter": 0.3,
    "policy": "rand-m9-mstd0.5-inc1",
}
OPTIM = {"lr": 2e-3, "warmup": "2ep", "ema": 0.9, "weight_decay": 0.05}

# Tiny models of the families of the recipes, with each recipe's choices.
DENSE = {
    "deit": {"optim": OPTIM, "augment": AUGMENT},
    "plain": {"optim": {"lr": 1e-3, "warmup": "0ep"}, "augment": {"smoothing": 0.1}},
    "deit3": {
        "model": {"name": "deit3_small_patch16_224"},
        "optim": OPTIM | {"name": "lamb", "loss": "bce", "lr": 4e-3},
        "augment": AUGMENT | {"smoothing": 0.0, "erasing": 0.0, "policy": "three_augment", "crop": "src"},
        "engine": {"zero": 0},
    },
    "fine_tuning": {"optim": OPTIM | {"layer_decay": 0.7, "clip": 1.0}, "augment": {"mixup": 0.2}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    pattern = write_shards(tmp_path_factory.mktemp("parity"), [20, 21])
    build_index(pattern)
    return pattern


def make(pattern: str, **sections) -> Config:
    model = {"name": "deit_tiny_patch16_224", "classes": 4, "image_size": 32, "args": SMALL} | sections.pop("model", {})
    return drawn_config(pattern, model=model, **sections)


@pytest.mark.parametrize("recipe", DENSE)
def test_dense_recipes_equal_timm_to_the_bit(shards, recipe):
    certificate = run(make(shards, **DENSE[recipe]), steps=25)
    assert certificate.equal, str(certificate)
    assert certificate.steps == 25 and certificate.tolerance == 0
    expected = {"initial weight", "weight decay", "learning rate", "images", "targets", "logits", "loss", "gradient", "weight"}
    assert expected <= certificate.largest.keys()
    assert ("average" in certificate.largest) == (recipe != "plain")
    assert certificate.losses[0] != certificate.losses[1]


def changed(settings: Config, **sections) -> Config:
    return settings.changed(**sections)


@pytest.mark.parametrize(
    ("change", "step", "what"),
    [
        ({"augment": {"smoothing": 0.11}}, 0, "targets"),
        ({"augment": {"mix_probability": 0.0}}, 0, "images"),
        ({"augment": {"mean": (0.5, 0.456, 0.406)}}, 0, "images"),
        ({"optim": {"weight_decay": 0.04}}, -1, "weight decay"),
        ({"optim": {"eps": 1e-7}}, -1, "optimizer option"),
        ({"optim": {"warmup": 3.0}}, -1, "learning rate"),
        ({"optim": {"min_lr": 2e-5}}, -1, "learning rate"),
        ({"optim": {"ema": 0.95}}, 0, "average"),
        ({"optim": {"layer_decay": 0.9}}, -1, "learning rate scale"),
        ({"optim": {"loss": "bce"}}, 0, "loss"),
    ],
)
def test_a_change_on_one_side_is_found_and_named(shards, change, step, what):
    settings = make(shards, **DENSE["deit"])
    certificate = run(settings, steps=12, against=changed(settings, **change))
    assert not certificate.equal
    assert (certificate.first.step, certificate.first.what) == (step, what), str(certificate)


def test_a_parameter_in_the_wrong_group_is_named(shards, monkeypatch):
    def build(model, settings):
        optimizer = optim.build_optimizer(model, settings)
        free, decayed = optimizer.param_groups
        assert free["weight_decay"] == 0
        names = {id(p): name for name, p in model.vit.named_parameters()}
        at = next(i for i, p in enumerate(free["params"]) if names[id(p)] == "blocks.1.norm2.weight")
        decayed["params"].append(free["params"].pop(at))
        return optimizer

    monkeypatch.setattr(parity, "build_optimizer", build)
    certificate = run(make(shards, **DENSE["deit"]), steps=3)
    assert "before the first step: weight decay blocks.1.norm2.weight, ours 0.05" in str(certificate)
    # without the look at the groups, the step itself shows it
    monkeypatch.setattr(parity, "initial", lambda model, optimizer: iter(()))
    monkeypatch.setattr("trainer.preflight.timm_recipe.initial", lambda model, optimizer: iter(()))
    certificate = run(make(shards, **DENSE["deit"]), steps=3)
    assert (certificate.first.what, certificate.first.name) == ("weight", "blocks.1.norm2.weight"), str(certificate)


def test_a_gradient_that_is_a_little_off_is_found_unless_it_is_tolerated(shards, monkeypatch):
    def biased(model: nn.Module, settings: Config) -> None:
        next(iter(model.parameters())).grad.mul_(1 + 1e-6)

    settings = make(shards, **DENSE["deit"])
    monkeypatch.setattr(parity, "clip", biased)
    found = run(settings, steps=5).first
    assert found.what == "weight" and found.name == "cls_token" and 0 < found.relative < 1e-4
    assert run(settings, steps=2, tolerance=1e-3).equal


def test_drop_path_and_dropout_are_switched_off_and_that_is_reported(shards):
    settings = make(shards, model={"drop_path": 0.5, "args": SMALL | {"proj_drop_rate": 0.5}}, **DENSE["deit"])
    certificate = run(settings, steps=3)
    assert certificate.equal, str(certificate)
    assert "drop path and dropout 0" in certificate.facts["changed"]


def test_a_teacher_and_frozen_parameters_are_left_out_and_that_is_reported(shards):
    """A model with a distillation token, which a teacher of logits would make return two logits."""
    recipe = DENSE["deit"] | {"optim": DENSE["deit"].get("optim", {}) | {"freeze": 1}}
    teacher = {"from": "timm", "logits": "soft"}
    settings = make(shards, model={"name": "deit_tiny_distilled_patch16_224", "args": SMALL}, teacher=teacher, **recipe)
    certificate = run(settings, steps=2)
    assert certificate.equal, str(certificate)
    assert "no teacher, nothing frozen" in certificate.facts["changed"]


def test_images_come_from_the_workers_also_where_the_run_decodes_on_the_device(shards, monkeypatch):
    """A GPU host would decode them with nvJPEG, and `--device cpu` would get tensors of its GPU."""
    made = []
    monkeypatch.setattr(
        parity, "training_stream", lambda index, config, *world: made.append(config) or training_stream(index, config, *world)
    )
    settings = make(shards, data={"decode_on": "device"}, **DENSE["plain"])
    assert run(settings, steps=2).equal
    assert [config.data.decode_on for config in made] == ["workers"]


def test_weights_from_a_file_are_given_to_both_sides(shards, tmp_path):
    settings = make(shards, **DENSE["deit"])
    save_weights(tmp_path / "w.safetensors", create(settings.model, 9).state_dict())
    certificate = run(changed(settings, model={"init": str(tmp_path / "w.safetensors")}), steps=2)
    assert certificate.equal and certificate.facts["initialisation"] == "timm's side takes ours"


def test_broken_images_are_left_out_with_their_partner(tmp_path):
    files = {}
    for i in range(30):
        files |= {f"img{i:05d}.jpg": jpeg(i)[: 60 if i % 7 == 3 else None], f"img{i:05d}.cls": str(i % 4).encode()}
    write_tar(tmp_path / "train-0000.tar", files)
    build_index(str(tmp_path / "train-*.tar"))
    certificate = run(make(str(tmp_path / "train-*.tar"), **DENSE["deit"]), steps=4, rows=12)
    assert certificate.equal, str(certificate)


def test_the_certificate_is_readable_json(shards, tmp_path):
    settings = make(shards, **DENSE["plain"])
    run(settings, steps=2).write(tmp_path / "good.json")
    run(settings, steps=2, against=changed(settings, augment={"smoothing": 0.2})).write(tmp_path / "bad.json")
    good, bad = (json.loads((tmp_path / name).read_text()) for name in ("good.json", "bad.json"))
    assert good["equal"] and good["first"] is None and good["steps"] == 2 and good["facts"]["timm"]
    assert good["facts"]["fingerprint"] == settings.fingerprint()
    assert not bad["equal"] and bad["first"]["what"] == "targets" and bad["first"]["step"] == 0


def test_without_shards_it_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing-here"):
        run(make(str(tmp_path / "nothing-here-*.tar")), steps=1)


def test_the_global_generators_are_left_alone(shards):
    # torch's is not looked at: every iteration of a DataLoader draws a base seed from it
    before = np.random.get_state()[1].copy(), random.getstate()
    run(make(shards, **DENSE["deit"]), steps=2)
    assert (before[0] == np.random.get_state()[1]).all() and before[1] == random.getstate()


def test_numpys_generator_is_left_as_it_was():
    before = np.random.get_state()
    with _numpy_seeded(5):
        drawn = np.random.random(3)
    with _numpy_seeded(5):
        assert (np.random.random(3) == drawn).all()
    assert all(np.array_equal(a, b) for a, b in zip(before, np.random.get_state(), strict=True))
