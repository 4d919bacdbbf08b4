"""The reference of the configuration: complete, as the schema has it, and the page in docs/ is the one that the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer.__main__ import main
from trainer.config import reference
from trainer.config.errors import ConfigError
from trainer.config.load import parse

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = {"name": "x", "model": {"name": "deit_tiny_patch16_224"}, "data": {"train": "a.tar", "validation": "b.tar"}}


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "configuration.md").read_text()


def test_every_key_has_a_meaning_that_ends_with_a_full_stop():
    assert [key.name for key in reference.all_keys() if not key.meaning.endswith(".")] == []


def leaves(tree: dict, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name}
    return found


def test_a_resolved_configuration_holds_the_keys_and_the_defaults_that_the_reference_names():
    resolved = parse(SMALLEST).resolved()
    known = {key.name: key for key in reference.all_keys() if not key.method}
    every = {key.name for key in reference.all_keys()}
    assert leaves(resolved) <= every
    methods = {f"{section}.{key}" for section in ("examples", "tokens", "connections", "plan") for key in resolved[section]}
    assert set(known) - methods <= leaves(resolved)
    for name, key in known.items():
        if key.default == "*required*" or key.default.startswith("epochs /"):  # a share of the run
            continue
        value = resolved
        for part in name.split("."):
            value = value[part]
        if isinstance(value, float):
            same = float(key.default) == pytest.approx(value, rel=1e-3)
        else:
            same = yaml.safe_load(key.default) == pytest.approx(value, rel=1e-3) if isinstance(value, list) else None
            same = str(yaml.safe_load(key.default)) == str(value) if same is None else same
        assert same, (name, key.default, value)


def test_settings_of_every_method_are_there_with_their_bounds():
    swap = next(key for key in reference.all_keys() if (key.name, key.method) == ("examples.swap", "forgetting"))
    assert swap.kind == "number >= 0, < 1" and swap.default == "0.05"
    warmup = next(key for key in reference.all_keys() if (key.name, key.method) == ("plan.warmup", "cosine"))
    assert warmup.kind == "epochs >= 0" and warmup.default == "epochs / 30"
    of_optim = next(key for key in reference.all_keys() if key.name == "optim.warmup")
    assert of_optim.default == "epochs / 10, at most 5" and parse(SMALLEST).optim.warmup == 5


def test_a_list_of_different_parts_names_each():
    stairs = next(key for key in reference.all_keys() if key.name == "plan.stairs")
    assert stairs.kind == "list of [epochs >= 0; number > 0, <= 1; number > 0, <= 1]"


def test_one_key_and_a_section(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "data.lanes"]) == 0
    assert capsys.readouterr().out.startswith("data.lanes\n    integer >= 1; default: 16\n")
    assert {key.name.partition(".")[0] for key in reference.select("tokens")} == {"tokens"}


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("data.lane", "data.lanes"),
        ("keep", "checkpoint.keep, connections.keep, tokens.keep, weights.keep"),
        ("token", "tokens"),
        ("lanes", "data.lanes"),
    ],
)
def test_an_unknown_key_names_what_is_near(asked: str, near: str):
    with pytest.raises(ConfigError, match=f"{asked}: unknown key; did you mean {near}?"):
        reference.select(asked)
