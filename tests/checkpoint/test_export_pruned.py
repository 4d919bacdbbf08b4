"""Exports of pruned weights: smaller layers and stored blocks give the masked network's logits; plain timm loads what it can build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sparsity.tokens.mass import Threshold
from sparsity.types import DENSE
from trainer import load_model, load_weights
from trainer.__main__ import main
from trainer.analysis.evaluation.scored_model import scored_model
from trainer.analysis.pictures import kept_weights
from trainer.checkpoint.export import export
from trainer.checkpoint.export_onnx import export_onnx
from trainer.checkpoint.save_load import save_checkpoint
from trainer.checkpoint.state import TrainState
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.model import weights as networks
from trainer.model.stored_form import read
from trainer.model.thresholds import Thresholds, weights_hash, write_to_run

ARGS = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODEL = {"name": "deit_tiny_patch16_224", "classes": 5, "image_size": 16, "args": ARGS}
RAW = {"name": "x", "data": {"train": "a", "validation": "b"}}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(folder: Path, prune: str = "0ep", tokens: Any = None, **weights: Any) -> dict[str, torch.Tensor]:
    """A run directory RUN with one checkpoint, pruned before its first step; its weights."""
    raw = {"name": "x", "model": MODEL, "data": {"train": "a", "validation": "b"}, "tokens": tokens or {}}
    config = parse(raw | {"weights": {"method": "magnitude", "prune": prune} | weights if weights else {"method": "all"}})
    vit = networks.create(config.model)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())), alpha=0.2)
    level = config.weights.settings.build(vit)
    level.begin_epoch(0, lambda: dict(vit.named_parameters()))
    state = vit.state_dict()
    for name, mask in level.masks().items():
        state[name] = state[name] * mask
    parts = {"optimizer": {}, "ema": {}, "examples": {}, "selection": None, "pruning": level.state_dict()}
    save_checkpoint(folder / "checkpoints", TrainState(step=7), config, "shards", weights=state, **parts)
    return state


def masked(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of plain timm with the masked weights."""
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=5, img_size=16, **ARGS)
    vit.load_state_dict(state)
    with torch.no_grad():
        return vit.eval()(IMAGES)


def test_units_of_equal_number_load_into_plain_timm(tmp_path: Path) -> None:
    """40 % of 96 units are 39, for which int(24 x mlp_ratio) must hold."""
    state = run(tmp_path, groups="units", keep=0.4)
    found = export(tmp_path, tmp_path / "small.safetensors", form="compact")
    assert "trainer.load_model" not in found.text() and "mlp_ratio=1.625" in found.text()
    args = json.loads(found.about["args"])
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=5, img_size=16, **args, checkpoint_path=str(found.path))
    assert vit.blocks[0].mlp.fc1.weight.shape == (39, 24)
    with torch.no_grad():
        torch.testing.assert_close(vit.eval()(IMAGES), masked(state), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_model(found.path)(IMAGES), masked(state), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(load_weights(found.path)(IMAGES), masked(state), rtol=1e-5, atol=1e-5)
    dense = export(tmp_path, tmp_path / "dense.safetensors")
    plain = load_weights(dense.path)
    assert type(plain) is type(vit) and not plain.training
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert found.path.stat().st_size < 0.7 * dense.path.stat().st_size


@pytest.mark.parametrize(
    ("groups", "keep", "per"), [("units", 0.3, "network"), ("heads", 0.5, "layer"), ("heads", 0.4, "network")]
)
def test_layers_of_other_sizes_load_with_our_loader_and_the_text_names_it(
    tmp_path: Path, groups: str, keep: float, per: str
) -> None:
    state = run(tmp_path, groups=groups, keep=keep, per=per)
    found = export(tmp_path, tmp_path / "small.safetensors", form="compact")
    assert f"load it with trainer.load_model({str(found.path)!r}), plain timm cannot build it" in found.text()
    model = load_model(found.path)
    torch.testing.assert_close(model(IMAGES), masked(state), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"written by export --compact, .*; load it with trainer\.load_model"):
        load_weights(found.path)
    assert sum(p.numel() for p in model.model.vit.parameters()) < sum(value.numel() for value in state.values())


@pytest.mark.parametrize(("groups", "per"), [("columns", "block"), ("rows", "layer")])
def test_blocks_come_back_to_the_bit_in_fewer_bytes(tmp_path: Path, groups: str, per: str) -> None:
    state = run(tmp_path, groups=groups, keep=0.5, per=per, block=[8, 10])
    found = export(tmp_path, tmp_path / "blocks.safetensors", form="blocks")
    assert "12 layers as blocks:" in found.text() and "trainer.load_model" in found.text()
    loaded = load_model(found.path)
    assert all(torch.equal(loaded.model.vit.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(loaded(IMAGES), masked(state))
    with pytest.raises(ConfigError, match=r"written by export --blocks, .*; load it with trainer\.load_model"):
        load_weights(found.path)
    sizes, stored = json.loads(found.about["bytes"]), load_file(found.path)
    assert sum(value.numel() * value.element_size() for name, value in stored.items() if ".weight." in name) == sizes["block"]
    assert sizes["block"] < 0.6 * sizes["dense"] < sizes["csr"]


@pytest.mark.parametrize(("groups", "form"), [("units", "compact"), ("heads", "compact"), ("columns", "blocks")])
def test_eval_takes_a_file_of_each_form(tmp_path: Path, groups: str, form: str) -> None:
    """What `trilevel eval FILE CONFIG` scores is the masked network; a damaged header is refused by name."""
    state = run(tmp_path, groups=groups, keep=0.5)
    found = export(tmp_path, tmp_path / "small.safetensors", form=form)
    config = parse({"name": "x", "model": MODEL, "data": {"train": "a", "validation": "b"}})
    network = scored_model(str(found.path), config, [], "eval").network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(IMAGES, DENSE).logits, masked(state), rtol=1e-5, atol=1e-5)
    damaged = found.about | {"args": "{"}
    networks.save_weights(tmp_path / "damaged.safetensors", load_file(found.path), damaged)
    with pytest.raises(ConfigError, match=r"damaged\.safetensors: the header does not describe a network"):
        scored_model(str(tmp_path / "damaged.safetensors"), config, [], "eval")


def test_a_run_starts_from_stored_blocks_and_from_units_cut_out_where_its_network_has_their_size(tmp_path: Path) -> None:
    """`model.init` and `teacher.from` of each form; what cannot be loaded is refused by its cause, with a remedy that works."""
    blocks = run(tmp_path / "b", groups="columns", keep=0.5, block=[8, 10])
    units = run(tmp_path / "u", groups="units", keep=0.4)
    run(tmp_path / "h", groups="heads", keep=0.5)
    packed, small, fewer = (
        export(tmp_path / name, tmp_path / f"{name}.safetensors", form=form)
        for name, form in (("b", "blocks"), ("u", "compact"), ("h", "compact"))
    )

    def started(path: Path, **args: Any) -> torch.nn.Module:
        return networks.create(parse(RAW | {"model": MODEL | {"init": str(path), "args": ARGS | args}}).model)

    assert all(torch.equal(value, blocks[name]) for name, value in started(packed.path).state_dict().items())
    with pytest.raises(
        ConfigError, match=r"model\.init=.*u\.safetensors: written by export --compact, which cut pruned units out; set"
    ) as error:
        started(small.path)
    args = str(error.value).partition("model.args='")[2].partition("'")[0]
    network = started(small.path, **json.loads(args)).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(IMAGES), masked(units), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"fewer heads than timm builds; export the run without --compact, or give its directory"
    ):
        started(fewer.path)
    with pytest.raises(ConfigError, match=r"teacher\.from=.*u\.safetensors: .* set teacher\.args='"):
        networks.weights_at(small.path, "teacher.from", ARGS)
    for header in ({"args": "[]"}, {"blocks": "[]"}, {"blocks": '{"blocks.0.attn.qkv": [1, 2]}'}):
        networks.save_weights(tmp_path / "damaged.safetensors", load_file(packed.path), packed.about | header)
        with pytest.raises(ConfigError, match=r"damaged\.safetensors: the header does not describe a network"):
            started(tmp_path / "damaged.safetensors")
    networks.save_weights(
        tmp_path / "foreign.safetensors", blocks, {"args": "Namespace(lr=.1)", "bytes": "many", "blocks": "12"}
    )
    assert torch.equal(started(tmp_path / "foreign.safetensors").state_dict()["head.weight"], blocks["head.weight"])


def test_a_compact_file_keeps_its_densities(tmp_path: Path) -> None:
    run(tmp_path, tokens={"method": "topk", "keep": 0.5, "blocks": [1]}, groups="units", keep=0.5)
    found = export(tmp_path, tmp_path / "small.safetensors", form="compact")
    dense = export(tmp_path, tmp_path / "dense.safetensors")
    small, whole = load_model(found.path), load_model(dense.path)
    torch.testing.assert_close(small(IMAGES, density=0.5), whole(IMAGES, density=0.5), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(small(IMAGES, density=0.5), small(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "words"), [({"importance": "value_norm"}, "tokens.importance=value_norm"), ({"fuse": True}, "tokens.fuse=true")]
)
def test_heads_are_not_cut_out_where_that_would_change_the_tokens(tokens: Any, words: str, tmp_path: Path) -> None:
    """A reviewer's file answered otherwise than its run for 14 % of the images, without a warning."""
    run(tmp_path, tokens={"method": "topk", "keep": 0.5, "blocks": [1]} | tokens, groups="heads", keep=0.34)
    with pytest.raises(
        ConfigError, match=f"--compact with {words}: a network without the pruned heads would keep other tokens"
    ):
        export(tmp_path, tmp_path / "x.safetensors", form="compact")


def test_an_onnx_file_has_no_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "x.onnx"), "--density", "1", "--blocks"]) == 2
    assert "--blocks: ONNX has no such form; leave it out" in capsys.readouterr().err


def test_a_compact_onnx_file_is_smaller(tmp_path: Path) -> None:
    run(tmp_path, tokens={"method": "topk", "keep": 0.5, "blocks": [1]}, groups="heads", keep=0.3)
    found = [export_onnx(tmp_path, tmp_path / f"{form}.onnx", 0.5, form=form).path for form in ("compact", "dense")]
    assert found[0].stat().st_size < 0.95 * found[1].stat().st_size


@pytest.mark.parametrize(
    "forged", [{"classes": "1000000000"}, {"args": '{"embed_dim": 3000000}'}, {"args": '{"depth": 1000000000}'}]
)
def test_a_header_out_of_proportion_does_not_take_the_memory_of_the_machine(tmp_path: Path, forged: dict[str, str]) -> None:
    run(tmp_path, groups="columns", keep=0.5)
    found = export(tmp_path, tmp_path / "blocks.safetensors", form="blocks")
    networks.save_weights(tmp_path / "forged.safetensors", load_file(found.path), found.about | forged)
    with pytest.raises(ConfigError, match=r"forged\.safetensors: the .*(does not fit into memory|needs more than 1\.0 GiB)"):
        load_model(tmp_path / "forged.safetensors")


def test_damaged_blocks_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, groups="columns", keep=0.5)
    found = export(tmp_path, tmp_path / "blocks.safetensors", form="blocks")
    state = load_file(found.path)
    name = "blocks.0.mlp.fc1.weight.values"
    counts = name.replace("values", "counts")
    negative = state[counts].short()
    negative[0], negative[1] = -1, negative[:2].sum() + 1
    missing = {key: value for key, value in state.items() if key != name}
    for damaged in (missing, state | {name: state[name][:-1]}, state | {counts: negative}):
        with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight"):
            read(damaged, found.about)
        networks.save_weights(tmp_path / "damaged.safetensors", damaged, found.about)
        with pytest.raises(ConfigError, match=r"the header does not describe a network: .*export it again"):
            load_model(tmp_path / "damaged.safetensors")
    about = found.about | {"blocks": found.about["blocks"].replace(", 16, 64, 1]", ", 0, 64, 1]")}
    with pytest.raises(ValueError, match=r"blocks of blocks\.0\..*sizes must be >= 1"):
        read(state, about)


@pytest.mark.parametrize(
    ("weights", "form", "words"),
    [
        ({}, "--compact", "pruned no weights (weights.method=all); leave the option out"),
        ({"groups": "columns", "keep": 0.5}, "--compact", "weights.groups=columns has no such form; use --blocks, or train with"),
        ({"groups": "units", "keep": 0.5}, "--blocks", "weights.groups=units has no such form; use --compact, or train with"),
        ({"groups": "units", "keep": 0.5, "prune": "9ep"}, "--compact", "no group is pruned yet in this checkpoint"),
        ({"groups": "units", "keep": 1.0}, "--compact", "or weights.keep=1; choose a later checkpoint, or leave the option out"),
    ],
)  # fmt: skip
def test_a_form_that_a_run_does_not_have_is_refused(
    tmp_path: Path, weights: dict[str, Any], form: str, words: str, capsys: Any
) -> None:
    run(tmp_path, **weights)
    assert main(["export", str(tmp_path), str(tmp_path / "out.safetensors"), form]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert main(["export", str(tmp_path), str(tmp_path / "out.safetensors")]) == 0
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert "blocks" not in file.metadata() and "compact" not in file.metadata()


def test_the_picture_shows_every_layer_and_is_refused_where_nothing_left(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path, groups="columns", keep=0.5, block=[8, 8])
    config = {"name": "x", "model": MODEL, "data": {"train": "a", "validation": "b"}}
    pruned = {"weights": {"method": "magnitude", "keep": 0.5, "block": [8, 8], "prune": "0ep"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | pruned))
    assert main(["show", str(tmp_path), "--weights"]) == 0
    with Image.open(capsys.readouterr().out.strip()) as picture:
        assert picture.size[0] > 900 and picture.size[1] > 600
    half = torch.zeros(400, 10, dtype=torch.bool)
    half[:200] = True
    assert kept_weights.shares(half).shape == (192, 10) and kept_weights.shares(half).mean() == pytest.approx(0.5, abs=1e-3)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["show", str(tmp_path), "--weights"]) == 2
    assert "--weights: the run pruned no weights (weights.method=all); leave the option out" in capsys.readouterr().err
    assert main(["show", str(tmp_path), "a.png", "--weights"]) == 2
    assert "draws the weights of a run, no images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "form", "stay"), [("units", "compact", True), ("columns", "blocks", True), ("heads", "compact", False)]
)
def test_thresholds_of_mass_go_with_the_file_unless_heads_are_gone(tmp_path: Path, groups: str, form: Any, stay: bool) -> None:
    tokens = {"method": "topk", "keep": 0.5, "blocks": [1], "position": "block"}
    state = run(tmp_path, tokens=tokens, groups=groups, keep=0.5)
    write_to_run(tmp_path, Thresholds(weights_hash(state), 1, "default", 1, 8, {0.5: Threshold(0.7, 0.5)}))
    model = load_model(export(tmp_path, tmp_path / "small.safetensors", form=form).path)
    dense = load_model(export(tmp_path, tmp_path / "dense.safetensors").path)
    assert dense.thresholds is not None and dense.thresholds.weights == weights_hash(state)
    if not stay:
        assert model.thresholds is None
        small = export(tmp_path, tmp_path / "small.safetensors", form=form).text()
        assert "thresholds left out: their mass is another without the pruned heads; run trilevel calibrate" in small
        return
    assert model.thresholds is not None and model.thresholds.mass(0.5) == 0.7
    torch.testing.assert_close(model(IMAGES, 0.5, adaptive=True), dense(IMAGES, 0.5, adaptive=True), rtol=1e-4, atol=1e-5)
