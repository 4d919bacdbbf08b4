"""`trilevel train CONFIG --check` and `trilevel estimate` about teachers and frozen parameters: found before training, shares printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsity.types import DENSE
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.config.run_config import Config
from trainer.model import weights
from trainer.model.build import build_model, cost_of
from trainer.preflight.check import check
from trainer.preflight.estimate import MeasuredRates, estimate

SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODEL = {"name": "deit_tiny_patch16_224", "classes": 10, "image_size": 16, "args": SMALL}


def config(digits: Path, **sections: Any) -> Config:
    data = {
        "train": f"{digits}/train-*.tar",
        "validation": f"{digits}/validation-*.tar",
        "batch": 64,
        "micro_batch": 64,
        "lanes": 4,
    }
    optim = {"warmup": "1ep"} | sections.pop("optim", {})
    return parse({"name": "t", "epochs": 4, "model": MODEL, "data": data, "optim": optim, **sections})


@pytest.fixture
def file(tmp_path: Path, digits: Path) -> Path:
    weights.save_weights(tmp_path / "teacher.safetensors", build_model(config(digits)).vit.state_dict())
    return tmp_path / "teacher.safetensors"


def test_the_teachers_share_of_the_multiply_adds_is_printed(digits: Path, file: Path):
    """Its forward pass beside three of the network: a quarter where both are dense and alike, more where the network is sparse."""
    teacher = {"from": str(file), "tokens": 1.0}
    dense = check(config(digits, tokens={"blocks": [1]}, teacher=teacher), 1)
    assert dense.teacher_share() == pytest.approx(1 / 4)
    one = cost_of(build_model(config(digits)), DENSE)["multiply_adds"]
    assert f"teacher from {file}: {one / 1e9:.4g} GMACs per image, 25.0% of the multiply-adds of a step" in dense.text()
    sparse = config(digits, tokens={"method": "topk", "keep": 0.25, "blocks": [1]}, teacher=teacher)
    checked = check(sparse, 1)
    assert checked.teacher_share() == pytest.approx(one / (3 * checked.plateaus[0].multiply_adds + one))
    assert checked.teacher_share() > 0.3
    note = estimate(sparse, MeasuredRates({"ours": 0.001}), 1).notes[-1]
    assert note.startswith(
        f"teacher: {one / 1e9:.4g} GMACs per image, {checked.teacher_share():.1%} of the multiply-adds of a step"
    )
    without = check(config(digits), 1)
    assert "teacher" not in without.text() and without.teacher_share() == 0
    assert not any("teacher" in note for note in estimate(config(digits), MeasuredRates({"ours": 0.001}), 1).notes)


def test_a_teacher_that_does_not_fit_is_found_before_training(digits: Path, file: Path):
    with pytest.raises(ConfigError, match=r"teacher.from=.*does not fit this model"):
        check(config(digits, teacher={"from": str(file), "logits": "soft", "args": SMALL | {"embed_dim": 48}}), 1)
    with pytest.raises(ConfigError, match=r"weights gone.safetensors: no such file"):
        check(config(digits, teacher={"from": "gone.safetensors", "logits": "soft"}), 1)


def test_frozen_parameters_are_counted(digits: Path):
    found = check(config(digits, optim={"freeze": ["blocks.*"]}), 1)
    blocks = sum(p.numel() for name, p in build_model(config(digits)).vit.named_parameters() if name.startswith("blocks."))
    assert found.frozen == blocks and f"M parameters ({blocks / 1e6:.2f} M frozen)" in found.text()
    assert "frozen" not in check(config(digits), 1).text()
    with pytest.raises(ConfigError, match=r"optim.freeze=4: this network has 3 blocks"):
        check(config(digits, optim={"freeze": 4}), 1)


def test_what_pruned_weights_leave_is_printed(digits: Path):
    """Half of the 96 hidden units of 3 blocks of width 24, 17 tokens: 48 units have 48 inputs and outputs and a bias each."""
    text = check(config(digits, weights={"method": "magnitude", "keep": 0.5, "groups": "units", "prune": "2ep"}), 1).text()
    dense, network = cost_of(build_model(config(digits)), DENSE)["multiply_adds"], build_model(config(digits)).vit
    left, whole = dense - 3 * 17 * 48 * 48, 4 * sum(p.numel() for p in network.parameters())
    small = whole - 4 * 3 * 48 * 49
    assert f"after pruning {left / 1e9:.4g} of {dense / 1e9:.4g} GMACs with every token ({left / dense:.3f})" in text
    assert f" {small / 1e6:.4g} of {whole / 1e6:.4g} MB of weights in float32" in text and f"({small / whole:.3f})" in text
    unequal = {"method": "admm", "keep": 0.5, "per": "network", "block": [8, 8], "start": "1ep", "prune": "2ep"}
    assert text.count("about") < check(config(digits, weights=unequal), 1).text().count("about"), "shares are not known yet"
    assert "after pruning" not in check(config(digits), 1).text()


def test_a_directory_in_which_the_run_could_not_begin_is_named(digits: Path, tmp_path: Path):
    """Unless it is to be resumed."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "weights.safetensors").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    there, wrong = config(digits, runs=str(tmp_path)), config(digits, runs=str(tmp_path / "file" / "runs"))
    assert (
        f"{tmp_path / 't'} exists: continue it with --resume, or start a new run with name=NEW_NAME" in check(there, 1).refused
    )
    assert f"cannot write to {tmp_path / 'file'}" in check(wrong, 1).refused
    assert check(there, 1, resume=True).refused == ""
    never = config(digits, runs=str(tmp_path), epochs=4, examples={"method": "forgetting", "removed": 0.3, "window": "30ep"})
    with pytest.raises(ConfigError, match=r"examples.window=30ep: no update"):
        check(never, 1, resume=True)
    (tmp_path / "t" / "journal.jsonl").write_text("")  # a run begun by a version that did not refuse it goes on
    assert check(never, 1, resume=True).refused == ""
