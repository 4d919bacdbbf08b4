"""What `tokens.importance: default` means for weights that were stored with that word, and which name is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsity.types import DENSE
from tests.support import images as drawn
from tests.support.journals import write
from trainer.config.run_config import Config, differences
from trainer.model import importance
from trainer.model.build import build_model

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
TWO = {"name": "deit_tiny_distilled_patch16_224", "classes": 4, "image_size": 16, "args": SMALL}  # prefix tokens
ONE = TWO | {"name": "deit_tiny_patch16_224"}


def config(model: dict[str, Any] = TWO, teacher: dict[str, Any] | None = None, **tokens: Any) -> Config:
    about = {"method": "topk", "keep": 0.5, "blocks": [1], "position": "block"} | tokens
    return drawn.config("nowhere", model=model, tokens=about, teacher=teacher or {})


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (config(), "prefix"),
        (config(position="attention"), "cls"),
        (config(ONE), "cls"),
        (config(ONE, importance="prefix"), "cls"),
        (config(ONE, importance="value_norm"), "value_norm"),
        (config(ONE, method="random"), ""),
    ],
)
def test_the_name_that_is_recorded(settings: Config, name: str) -> None:
    assert importance.name_of(settings, build_model(settings)) == name


def compared(now: Config, before: Config, stored: str | None) -> dict[str, tuple[Any, Any]]:
    return importance.compared(differences(now, before), now, before, stored, build_model(now))


def test_a_resume_compares_scores_not_words() -> None:
    key, lr = "tokens.importance", {"optim": {"lr": 0.5}}
    assert compared(config(), config(), None) == {key: ("prefix", "cls")}, "value-based selection ranked by cls"
    assert compared(config(importance="cls"), config(), None) == {}, "the remedy"
    assert compared(config(), config(), "prefix") == {}
    assert compared(config(), config(), "cls") == {key: ("prefix", "cls")}
    assert compared(config(ONE), config(ONE), None) == compared(config(ONE, importance="cls"), config(ONE), None) == {}
    other = config(ONE).changed(**lr)
    assert compared(other, config(ONE), "cls").keys() == {"optim.lr"}, "other settings still count"
    taught = {"from": "x", "tokens": 1.0}
    assert compared(config(importance="cls", teacher=taught), config(teacher=taught), None) == {key: ("cls", "cls and prefix")}


def test_stored_weights_keep_their_meaning() -> None:
    now, network = config(), build_model(config())
    assert importance.pinned(now, network, "prefix") == (now, network) == importance.pinned(now, network, None)
    older, theirs = importance.pinned(now, network, "default")
    assert (older.tokens.settings.importance, theirs.importance) == ("cls", "cls")
    assert theirs.network is network.network and theirs.cost(DENSE) == network.cost(DENSE)
    named = config(importance="received")
    assert importance.pinned(named, build_model(named), "default")[0] == named, "what a user names is taken"


def test_where_it_is_recorded(tmp_path: Path) -> None:
    start = {"kind": "start", "time": 1.0, "attempt": 0}
    for folder, line, name in (("old", start, "default"), ("new", start | {"importance": "prefix"}, "prefix")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, [line])
        assert importance.stored_with(tmp_path / folder, {}) == name
        assert importance.stored_with(tmp_path / folder / "weights.safetensors", {}) == name
    assert importance.stored_with(tmp_path / "alone.safetensors", {}) is None
    for section, name in (({"importance": "prefix"}, "prefix"), ({"importance": "default"}, "default"), ({}, None)):
        assert importance.stored_with(tmp_path / "x.safetensors", {"tokens": json.dumps(section)}) == name
