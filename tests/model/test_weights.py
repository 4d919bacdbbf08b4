"""Where weights come from and go to: timm's names both ways, warnings for what is resized or reset, errors for what does not fit."""

import os

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import load_checkpoint

import trainer.model.weights as weights
from trainer.config.errors import ConfigError
from trainer.config.schema import ModelConfig
from trainer.model.weights import create, load_weights, save_weights, to_timm

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def model(name="deit_tiny_patch16_224", classes=5, image_size=64, init="random", **args):
    return ModelConfig(name=name, classes=classes, image_size=image_size, init=str(init), args=SMALL | args)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


class Warned(list):
    def __call__(self, text):
        self.append(text)


class Evil:
    """Code in a pickle: makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_random_is_timms_initialisation_keyed_by_the_seed(name):
    before = torch.get_rng_state()
    ours = create(model(name), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=5, img_size=64, **SMALL).state_dict()
    assert same(ours, theirs)
    assert same(ours, create(model(name), seed=3).state_dict())
    assert not same(ours, create(model(name), seed=4).state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_comes_back_whole_and_loads_into_plain_timm(tmp_path, suffix):
    first, warned = create(model(), seed=1), Warned()
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"model": first.state_dict(), "epoch": 3}, path)
    else:
        save_weights(path, {f"vit.{name}": value for name, value in first.state_dict().items()})
        assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert same(create(model(init=path), seed=2, warn=warned).state_dict(), first.state_dict())
    assert warned == []
    plain = timm.create_model("deit_tiny_patch16_224", num_classes=5, img_size=64, **SMALL)
    load_checkpoint(plain, str(path))
    assert same(plain.state_dict(), first.state_dict())


def test_averaged_weights_are_preferred_as_in_timm(tmp_path):
    first, second = create(model(), seed=1).state_dict(), create(model(), seed=2).state_dict()
    torch.save({"model": first, "model_ema": second}, tmp_path / "w.pth")
    assert same(load_weights(tmp_path / "w.pth"), second)


def test_wrappers_prefixes_are_stripped_in_any_order_but_only_from_all():
    state = create(model()).state_dict()
    for prefix in ("network.", "vit.", "module.", "_orig_mod.", "module._orig_mod.network.", "_orig_mod.module."):
        assert same(to_timm({prefix + name: value for name, value in state.items()}), state)
    mixed = {"vit.a": torch.zeros(1), "b": torch.zeros(1)}
    assert to_timm(mixed).keys() == mixed.keys()
    assert to_timm({}) == {}


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_position_embedding_is_resized_by_timm_with_a_warning(tmp_path, name):
    first, warned = create(model(name), seed=1), Warned()
    save_weights(tmp_path / "w.safetensors", first.state_dict())
    second = create(model(name, image_size=96, init=tmp_path / "w.safetensors"), warn=warned)
    prefix = 0 if second.no_embed_class else second.num_prefix_tokens
    expected = resample_abs_pos_embed(first.pos_embed.data, [6, 6], num_prefix_tokens=prefix)
    assert torch.equal(second.pos_embed.data, expected)
    assert len(warned) == 1 and "pos_embed was resized from [1, " in warned[0]
    assert torch.equal(first.blocks[1].attn.qkv.weight, second.blocks[1].attn.qkv.weight)


def test_patch_kernels_are_resized_with_a_warning(tmp_path):
    save_weights(tmp_path / "w.safetensors", create(model(), seed=1).state_dict())
    warned = Warned()
    create(model(image_size=32, init=tmp_path / "w.safetensors", patch_size=8), warn=warned)
    assert len(warned) == 1 and "patch_embed.proj.weight was resized from [16, 3, 16, 16] to [16, 3, 8, 8]" in warned[0]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_head_of_other_classes_is_reset_with_a_warning(tmp_path, name):
    first, fresh, warned = create(model(name), seed=1), create(model(name, classes=7), seed=2), Warned()
    save_weights(tmp_path / "w.safetensors", first.state_dict())
    second = create(model(name, classes=7, init=tmp_path / "w.safetensors"), seed=2, warn=warned)
    assert torch.equal(second.head.weight, fresh.head.weight) and torch.equal(second.cls_token, first.cls_token)
    assert len(warned) == 1 and "head.weight, head.bias" in warned[0] and "7 classes" in warned[0]
    assert ("head_dist.weight" in warned[0]) == ("distilled" in name)
    headless = {name: value for name, value in first.state_dict().items() if not name.startswith("head")}
    save_weights(tmp_path / "w.safetensors", headless)
    create(model(name, init=tmp_path / "w.safetensors"), warn=warned)
    assert "the file has {'head.weight': 'nothing'" in warned[1]


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    state = create(model()).state_dict()
    state["blocks.0.norm1.wieght"] = state.pop("blocks.0.norm1.weight")
    state["norm.bias"] = torch.zeros(3)
    save_weights(tmp_path / "w.safetensors", state)
    with pytest.raises(ConfigError) as caught:
        create(model(init=tmp_path / "w.safetensors"))
    text = str(caught.value)
    assert (
        "blocks.0.norm1.weight: missing" in text and "wieght: unknown to the model; did you mean blocks.0.norm1.weight?" in text
    )
    assert "norm.bias: [3] in the file, [16] in the model" in text


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """Training would skip its steps and advise a lower learning rate."""
    state = create(model()).state_dict()
    state["norm.bias"][2] = float("nan")
    save_weights(tmp_path / "w.safetensors", state)
    with pytest.raises(ConfigError, match=r"model.init=.*w.safetensors: 1 values of norm.bias are not finite"):
        create(model(init=tmp_path / "w.safetensors"))


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*weights.safetensors"):
        (tmp_path / "weights.safetensors").write_bytes(b"x")
        load_weights(tmp_path / "wieghts.safetensors")
    with pytest.raises(ConfigError, match="cannot be read as tensors"):
        load_weights(tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"no such file; give 'timm', the path of a weights file or"):
        create(model(init="ranbom"))
    torch.save({"model": Evil(tmp_path / "done")}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"cannot be read as tensors \(it holds pickled objects, e.g. a whole module\)"):
        load_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "done").exists()
    torch.save({"model": [1, 2]}, tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="no dictionary of tensors"):
        load_weights(tmp_path / "list.pth")


def test_unknown_models_and_arguments_are_refused_with_what_is_near():
    with pytest.raises(ConfigError, match=r"model.name='deit_smal_patch16_224'.*did you mean deit_small_patch16_224"):
        create(ModelConfig(name="deit_smal_patch16_224"))
    with pytest.raises(ConfigError, match=r"model.drop_path=0.1: model.name=vgg11 has no drop path; set model.drop_path=0"):
        create(ModelConfig(name="vgg11", drop_path=0.1))
    with pytest.raises(ConfigError, match=r"model.args.drop_path_rate: set model.drop_path instead"):
        create(model(drop_path_rate=0.1))
    with pytest.raises(ConfigError, match=r"rejected by timm.*num_haeds"):
        create(model(num_haeds=3))
    with pytest.raises(ConfigError, match=r"rejected by timm.*os\.system"):
        create(model(act_layer="os.system"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("Storage size calculation overflowed with sizes=[1, 1000000000000, 192]"),
        MemoryError(),
    ],
)
def test_a_model_that_does_not_fit_into_memory_names_its_keys(monkeypatch, error):
    def too_large(*_, **__):
        raise error

    monkeypatch.setattr(weights.timm, "create_model", too_large)
    with pytest.raises(
        ConfigError, match=r"model.image_size=.*model.classes=1000000000 .*does not fit into memory.*use smaller"
    ):
        create(model(classes=10**9))


def test_pretrained_weights_that_cannot_be_fetched_name_a_remedy(monkeypatch):
    def offline(*args, pretrained, **kwargs):
        assert pretrained
        raise FileNotFoundError("no route to the hub\nand more")

    monkeypatch.setattr(weights.timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"cannot download weights of .* \(no route to the hub\).*model.init=PATH"):
        create(model(init="timm"))
