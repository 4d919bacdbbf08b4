"""docs/fine-tuning.md: its commands run on the digits with a smaller network and one epoch, and do what it states."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, lines
from trainer import load_config, run_training
from trainer.__main__ import main
from trainer.config.reference import select
from trainer.model.build import build_model
from trainer.model.teacher import build_teacher

TEXT = (ROOT / "docs" / "fine-tuning.md").read_text()
BLOCK = re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S)[0]
COMMANDS = [shlex.split(line) for line in BLOCK.splitlines()]
QUICK = [
    "model.args.embed_dim=24",
    "model.args.depth=4",
    "epochs=1",
    "data.workers=0",
    "evaluate.every=0ep",
    "tracking.to=journal",
    "control=0",
]
ALONE = ["engine.kind=ddp", "engine.zero=0", "optim.warmup=0ep", "data.batch=480", "data.micro_batch=480"]


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After the guide's commands: runs/dense, runs/tuned, runs/taught."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "shards").mkdir()
    (folder / "shards" / "digits").symlink_to(digits)
    assert [words[:2] for words in COMMANDS] == [["trilevel", "pack"], *[["trilevel", "train"]] * 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for _, _, config, *words in COMMANDS[1:]:
            if "--check" in words:
                assert main(["train", config, *words, *QUICK]) == 0
            else:
                run_training(load_config(config, *words, *QUICK, *ALONE))
    return folder


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "weights.safetensors")


@pytest.mark.timeout(600)
def test_the_tuned_run_began_with_the_dense_one_and_froze_what_it_was_to(folder: Path):
    before, after = weights(folder, "dense"), weights(folder, "tuned")
    front = {name for name in before if name.startswith(("patch_embed.", "cls_token", "pos_embed", "blocks.0.", "blocks.1."))}
    assert {name for name in before if torch.equal(before[name], after[name])} == front


def test_the_taught_run_has_the_dense_one_as_its_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    run = Path("runs/taught")
    steps = lines(run, "step")
    assert steps and all(line["loss"] == pytest.approx(line["loss_labels"] + line["loss_tokens"]) for line in steps)
    assert all(line["loss_tokens"] > 0 for line in steps)
    config = load_config(run, "model.init=random")
    assert build_teacher(config, build_model(config), frozenset()).hash == lines(run, "start")[0]["teacher_hash"]


def test_a_new_head_and_a_larger_image_fit(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As the tables state: 12 classes for 10, 5 x 5 patches for 4 x 4."""
    monkeypatch.chdir(folder)
    begin = ["model.init=runs/dense", "model.args.patch_size=8", *QUICK, *ALONE]
    run_training(load_config("configs/quickstart_dense.yaml", "name=more", "model.classes=12", "model.image_size=40", *begin))
    after, before = weights(folder, "more"), weights(folder, "dense")
    assert after["head.weight"].shape[0] == 12 and before["head.weight"].shape[0] == 10
    assert after["pos_embed"].shape[1] == 26 and before["pos_embed"].shape[1] == 17


def test_every_key_in_the_guide_exists():
    keys = set(re.findall(r"`((?:model|optim|teacher|augment|engine|tokens)\.\w+)", TEXT)) - {"model.args"}
    assert len(keys) > 12
    for key in keys - {"model.args.patch_size"}:
        assert select(key)


def test_the_messages_in_the_guide_are_those_of_the_code():
    """The fixed words of each message of the last table, in the code that raises it."""
    code = "".join(
        (ROOT / "trainer" / file).read_text()
        for file in ("model/teacher.py", "config/schema_teacher.py", "checkpoint/save_load.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    for words in (
        "no loss uses this teacher",
        "the teacher has another number of classes",
        "the teacher has a grid of",
        "prefix tokens, the model",
    ):
        assert words in code and any(part in TEXT for part in (words,))
    assert "teacher: checkpoint was trained with" in code and "teacher: checkpoint was trained with" in TEXT
