"""A teacher: where its weights come from, what fits which network, its hash, and that training never touches it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from timm.models.deit import VisionTransformerDistilled

from sparsity.types import DENSE
from tests.support import images as drawn
from tests.support.journals import write
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.config.schema_run import EngineConfig
from trainer.model import weights
from trainer.model.build import build_distillation, build_model
from trainer.model.teacher import Teacher, build_teacher, teacher_pixels
from trainer.storage.disk import Disk

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODEL: dict[str, Any] = {"name": "deit_tiny_patch16_224", "classes": 4, "image_size": 16, "args": SMALL}


def config(source: Any, model: dict[str, Any] | None = None, **teacher: Any) -> Config:
    losses = {} if {"tokens", "logits"} & teacher.keys() else {"tokens": 1.0}
    return drawn.config(
        "nowhere", model=MODEL | (model or {}), tokens={"blocks": [1]}, teacher={"from": str(source)} | losses | teacher
    )


def build(settings: Config) -> Teacher:
    return build_teacher(settings, build_model(settings), build_distillation(settings).teacher_outputs, warn=lambda _: None)


def saved(path: Path, seed: int = 1, **model: Any) -> Path:
    weights.save_weights(path, weights.create(drawn.config("nowhere", model=MODEL | model).model, seed).state_dict())
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "dense.safetensors")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory: a network with other arguments than MODEL, its weights, and their hash in the journal."""
    directory, theirs = tmp_path / "runs" / "dense", {"args": SMALL | {"embed_dim": 48}}
    directory.mkdir(parents=True)
    found = Disk().content(saved(directory / "weights.safetensors", **theirs))
    (directory / "config.yaml").write_text(yaml.safe_dump(drawn.config("nowhere", model=MODEL | theirs).resolved()))
    about = {"bytes": found.size, "hash": found.hash}
    write(
        directory,
        [{"kind": "checkpoint", "time": 1.0, "attempt": 0, "step": 3, "path": "checkpoints/step-00000003", "weights": about}],
    )
    return directory


def alone(precision: str = "float32", **more: Any) -> Any:
    """An engine that computes on this CPU."""
    settings = EngineConfig(kind="ddp", zero=0, precision=precision, **more)  # pyright: ignore[reportArgumentType]
    forward = lambda network, images, *args: network(images.to(next(network.parameters()).dtype), *args)  # noqa: E731
    return SimpleNamespace(device=torch.device("cpu"), settings=settings, forward_unwrapped=forward)


# -- where it comes from -------------------------------------------------------------------------------------------------


def test_a_file_teaches_as_the_network_that_it_is_of_does(file: Path):
    teacher, pixels = build(config(file, tokens=1.0, logits="soft")), torch.randn(2, 3, 16, 16)
    plain = weights.create(drawn.config("nowhere", model=MODEL).model, 1).eval()
    teacher.prepare(alone())
    teacher.use_kernels(kernels := {(17, False): "math"})
    assert teacher.network is not None and teacher.network.kernels is kernels
    phases: list[str] = []
    taught = teacher.observe(pixels.requires_grad_(), phases.append)
    assert taught is not None and torch.equal(taught.logits, plain(pixels))
    assert taught.cls_attention is not None and taught.cls_attention.shape == (2, 16)
    assert phases == ["forward", "teacher"]
    assert not taught.logits.requires_grad and not any(p.requires_grad for p in teacher.network.parameters())


def test_it_drops_nothing_at_random(file: Path):
    teacher, pixels = (
        build(config(file, args=SMALL | {"proj_drop_rate": 0.5, "attn_drop_rate": 0.5})),
        torch.randn(2, 3, 16, 16),
    )
    teacher.prepare(alone())
    first, second = (teacher.observe(pixels, lambda _: None) for _ in range(2))
    assert first is not None and second is not None and torch.equal(first.logits, second.logits)


def test_a_run_names_its_own_network(run: Path):
    teacher = build(config(run))
    assert teacher.network is not None and teacher.network.vit.embed_dim == 48
    assert build(config(run / "weights.safetensors", args=SMALL | {"embed_dim": 48})).hash == teacher.hash


def test_timms_weights_by_name(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def create(name: str, pretrained: bool, **args: Any) -> Any:
        asked.append((name, pretrained, args))
        found = plain_create(name, pretrained=False, **args)
        found.pretrained_cfg["num_classes"] = 1000
        return found

    plain_create = weights.timm.create_model
    settings = config("timm", name="deit_small_patch16_224", args=SMALL)
    student = build_model(settings)
    monkeypatch.setattr(weights.timm, "create_model", create)
    assert build_teacher(settings, student, frozenset()).hash
    assert asked[0] == (("deit_small_patch16_224", True, {"num_classes": 4, "img_size": 16, "drop_path_rate": 0.0, **SMALL}))
    with pytest.raises(
        ConfigError, match=r"teacher.from=timm with teacher.logits=hard: the teacher has another number of classes"
    ):
        build_teacher(config("timm", logits="hard"), student, frozenset())


def test_the_name_defaults_to_the_model_and_a_name_of_its_own_has_no_arguments_of_the_model(file: Path):
    with pytest.raises(ConfigError, match=r"teacher.from=.*does not fit this model"):
        build(config(file, name="deit_tiny_patch16_224"))  # of full size
    with pytest.raises(ConfigError, match=r"teacher.name='deit_tinny_patch16_224': unknown model of timm"):
        build(config(file, name="deit_tinny_patch16_224"))
    with pytest.raises(ConfigError, match=r"teacher.name=resnet18 with teacher.args={'heads': 3}: rejected by timm"):
        build(config(file, name="resnet18", args={"heads": 3}))


def test_no_teacher_does_nothing():
    teacher = build(drawn.config("nowhere", model=MODEL))
    teacher.prepare(alone())
    assert teacher.observe(torch.zeros(1, 3, 16, 16), print) is None
    assert (teacher.hash, teacher.multiply_adds, teacher.facts()) == ("", 0, {})


def test_what_is_recorded_of_it(file: Path):
    teacher = build(config(file))
    teacher.prepare(alone())
    facts = teacher.facts()
    parameters = sum(p.numel() for p in weights.create(drawn.config("nowhere", model=MODEL).model).parameters())
    assert facts["teacher_parameters"] == parameters and facts["teacher_memory_mib"] == round(4 * parameters / 2**20, 1)
    assert facts["teacher_hash"] == teacher.hash and facts["teacher_multiply_adds"] == teacher.multiply_adds > 0
    teacher.prepare(alone("bf16"))
    assert {p.dtype for p in teacher.network.parameters()} == {torch.bfloat16}
    assert teacher.facts()["teacher_memory_mib"] == round(2 * parameters / 2**20, 1)


# -- its hash ------------------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_weights_and_their_network_not_of_the_file(tmp_path: Path, file: Path):
    first = build(config(file)).hash
    torch.save({"model": weights.load_weights(file)}, tmp_path / "same.pth")
    assert build(config(tmp_path / "same.pth")).hash == first
    assert build(config(saved(tmp_path / "other.safetensors", seed=2))).hash != first
    assert build(config(file, args=SMALL | {"num_heads": 6})).hash != first  # the same shapes, another network


# -- what does not fit ---------------------------------------------------------------------------------------------------


def test_a_teacher_of_another_patch_grid(tmp_path: Path):
    theirs = SMALL | {"patch_size": 8}
    other = saved(tmp_path / "other.safetensors", args=theirs)
    with pytest.raises(
        ConfigError, match=r"teacher.tokens=1: the teacher has a grid of 2 x 2 patches, the model 4 x 4; choose"
    ):
        build(config(other, args=theirs))
    assert build(config(other, args=theirs, logits="soft")).network is not None  # logits have no patches


def test_a_teacher_with_other_prefix_tokens(tmp_path: Path):
    theirs = {"name": "deit_tiny_distilled_patch16_224"}
    other = saved(tmp_path / "other.safetensors", **theirs)
    with pytest.raises(ConfigError, match=r"the teacher has 2 prefix tokens, the model 1; choose"):
        build(config(other, name=theirs["name"], args=SMALL))
    teacher = build(config(other, name=theirs["name"], args=SMALL, logits="hard"))
    teacher.prepare(alone())
    assert isinstance(teacher.network.vit, VisionTransformerDistilled)
    assert isinstance(teacher.observe(torch.zeros(1, 3, 16, 16), lambda _: None).logits, torch.Tensor)  # the mean of its heads


def test_a_teacher_with_other_classes_teaches_tokens_but_no_logits(tmp_path: Path):
    other = saved(tmp_path / "other.safetensors", classes=7)
    with pytest.raises(
        ConfigError, match=r"teacher.logits=soft: the teacher has another number of classes than model.classes=4"
    ):
        build(config(other, logits="soft"))
    assert build(config(other)).network is not None


def test_a_model_that_drops_patches_at_random(file: Path):
    dropping = {"args": SMALL | {"patch_drop_rate": 0.25}}
    with pytest.raises(ConfigError, match=r"model.args.patch_drop_rate=0.25.*set patch_drop_rate=0, or teacher.tokens=0"):
        build(config(file, dropping, args=SMALL))


def test_a_block_that_the_model_does_not_have(file: Path):
    settings = config(file).changed(tokens={"blocks": (3,)})
    with pytest.raises(ConfigError, match=r"teacher.tokens=1 with tokens.blocks=\[3\]: .* has blocks 0 to 2"):
        build(settings)


def test_a_run_whose_weights_changed_or_are_missing(run: Path):
    data = bytearray((run / "weights.safetensors").read_bytes())
    data[-3] ^= 64
    (run / "weights.safetensors").write_bytes(data)
    with pytest.raises(
        ConfigError,
        match=r"teacher.from=.*dense: .*has the hash .* the journal recorded.*: trilevel export .*dense NEW\.safetensors",
    ):
        build(config(run))
    (run / "weights.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"teacher.from=.*dense: no weights at"):
        build(config(run))
    with pytest.raises(ConfigError, match=r"no such file; "):
        build(config(run.parent / "dens"))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"tokens": 1.0}, r"teacher.tokens=1.0 with teacher.from=none: there is no teacher; set teacher.from"),
        ({"logits": "soft"}, r"teacher.logits='soft' with teacher.from=none"),
        ({"name": "deit_tiny_patch16_224"}, r"teacher.name='deit_tiny_patch16_224' with teacher.from=none"),
        ({"from": "timm"}, r"teacher.from=timm: no loss uses this teacher; set teacher.tokens=1"),
        (
            {"from": "timm", "tokens": 1, "tau": 3},
            r"teacher.tau=3 with teacher.logits=none has no effect; set teacher.logits=soft",
        ),
        ({"from": "timm", "logits": "hard", "tau": 3}, r"teacher.tau=3 with teacher.logits=hard has no effect"),
        ({"from": "timm", "tokens": 1, "alpha": 0.1}, r"teacher.alpha=0.1 with .*set teacher.logits=soft or hard"),
        (
            {"from": "timm", "tokens": 1, "args": {"checkpoint_path": "x"}},
            r"teacher.args.checkpoint_path='x': .* teacher.from=FILE",
        ),
    ],
)
def test_settings_without_effect_are_refused(teacher: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        drawn.config("nowhere", model=MODEL, teacher=teacher)


def test_token_distillation_needs_a_block():
    with pytest.raises(ValueError, match=r"teacher.tokens=1 with tokens.blocks=\[\]: .*e.g. tokens.blocks=\[2\]"):
        drawn.config("nowhere", model=MODEL, tokens={"blocks": []}, teacher={"from": "timm", "tokens": 1})


# -- weights to begin with -----------------------------------------------------------------------------------------------


def test_a_run_is_a_beginning_too(run: Path, tmp_path: Path):
    theirs = MODEL | {"args": SMALL | {"embed_dim": 48}}
    begun = weights.create(drawn.config("nowhere", model=theirs | {"init": str(run)}).model)
    first = weights.load_weights(run / "weights.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in begun.state_dict().items())
    shutil.copytree(run, tmp_path / "changed")
    saved(tmp_path / "changed" / "weights.safetensors", seed=5, args=theirs["args"])
    with pytest.raises(ConfigError, match=r"model.init=.*changed: .*the journal recorded"):
        weights.create(drawn.config("nowhere", model=theirs | {"init": str(tmp_path / "changed")}).model)


def test_the_teacher_is_in_no_list_of_what_trains(file: Path):
    """The model of the optimizer, of ZeRO and of checkpoints is the student alone."""
    settings = config(file)
    student = build_model(settings)
    before = set(student.state_dict())
    teacher = build_teacher(settings, student, frozenset())
    assert set(student.state_dict()) == before and not set(map(id, student.parameters())) & set(
        map(id, teacher.network.parameters())
    )
    assert teacher.network(torch.zeros(1, 3, 16, 16), DENSE).logits.shape == (1, 4)


@pytest.mark.parametrize("importance", ["received", "value_norm"])
def test_an_importance_that_distillation_does_not_teach(file: Path, importance: str):
    tokens = {"method": "topk", "keep": 0.5, "blocks": [1], "importance": importance}
    changed = drawn.config("nowhere", model=MODEL, tokens=tokens, teacher={"from": str(file), "tokens": 1.0})
    with pytest.raises(
        ConfigError, match=rf"teacher\.tokens=1 with tokens\.importance={importance}: .*leave out tokens\.importance"
    ):
        build(changed)


@pytest.mark.parametrize("method", ["random", "tome"])
def test_a_selection_that_does_not_read_importance(file: Path, method: str):
    settings = drawn.config(
        "nowhere",
        model=MODEL,
        tokens={"method": method, "keep": 0.5, "blocks": [1]},
        teacher={"from": str(file), "tokens": 1.0},
    )
    with pytest.raises(ConfigError, match=rf"teacher\.tokens=1 with tokens\.method={method}: .*set tokens\.method=topk"):
        build(settings)


EMBEDDING = ["patch_embed.*", "cls_token", "pos_embed"]


@pytest.mark.parametrize(
    "freeze", [2, 3, [*EMBEDDING, "blocks.0.*", "blocks.1.*"], [*EMBEDDING, "blocks.0.*", "blocks.1.[na]*"]]
)
def test_distillation_of_tokens_into_frozen_blocks(file: Path, freeze: Any):
    settings = config(file).changed(optim={"freeze": freeze})
    with pytest.raises(
        ConfigError, match=r"teacher\.tokens=1 with optim\.freeze=.*: the importance of block 1 .*set optim\.freeze<=1, or"
    ):
        build(settings)
    assert build(config(file, logits="soft").changed(optim={"freeze": freeze})).network is not None, "logits train the head"


@pytest.mark.parametrize("freeze", [0, 1, ["blocks.*"], [*EMBEDDING, "blocks.0.*"]])
def test_distillation_of_tokens_where_a_part_before_the_block_trains(file: Path, freeze: Any):
    settings = config(file).changed(optim={"freeze": freeze})
    student = build_model(settings)
    assert build_teacher(settings, student, frozenset()).network is not None
    assert all(parameter.requires_grad for parameter in student.parameters()), "the optimizer freezes, not the teacher"


def test_a_teacher_of_other_pixels_is_named(file: Path, run: Path, tmp_path: Path):
    assert teacher_pixels(config("none", tokens=0.0)) == teacher_pixels(config(run)) == teacher_pixels(config(file)) == []
    (found,) = teacher_pixels(config(run).changed(augment={"mean": (0.5,) * 3, "std": (0.5,) * 3}))
    assert "teacher.from=" in found and "augment has mean [0.5, 0.5, 0.5] std [0.5, 0.5, 0.5]; set augment.mean" in found
    (found,) = teacher_pixels(config("timm", name="vit_tiny_patch16_224"))
    assert "trained with mean [0.5, 0.5, 0.5]" in found
