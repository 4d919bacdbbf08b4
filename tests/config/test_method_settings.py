"""Settings of the chosen method: refused where they are another method's, and read from runs that recorded all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsity.types import Plan
from tests.config.test_config import PLAIN, changed
from tests.conftest import ROOT
from tests.support.recorded_configs import recorded
from trainer.config.errors import ConfigError
from trainer.config.load import load, parse, parse_recorded
from trainer.config.recorded import RECORDED, method_sections, without_foreign
from trainer.config.run_config import differences


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tokens.keep=0.7"], ["tokens.keep=0.7: not a setting of tokens.method=all", "topk|random|tome", "remove tokens.keep"]),
        (["tokens.method=tome", "tokens.keep=0.7", "tokens.fuse=true"], ["tokens.fuse=True: not a setting of tokens.method=tome"]),
        (["tokens.method=topk", "tokens.merged=4"], ["tokens.merged=4", "set tokens.method=tome"]),
        (["connections.keep=0.1"], ["connections.keep=0.1", "exact|shared_keys|shared_keys_column"]),
        (["examples.removed=0.2"], ["examples.removed=0.2: not a setting of examples.method=all", "forgetting|infobatch"]),
        (["examples.method=infobatch", "examples.swap=0.1"], ["examples.swap=0.1", "set examples.method=forgetting"]),
        (["examples.method=infobatch", "examples.balanced=true"], ["examples.balanced=True", "random_fixed"]),
        (["examples.method=forgetting", "examples.probe_share=0.2"],
         ["examples.probe_share=0.2: not a setting of examples.rule=clear", "set examples.rule=probe, or remove examples.probe_share"]),
        (["examples.rule=probe"], ["examples.rule=probe with examples.method=all", "rule=clear, or examples.method=forgetting"]),
        (["examples.method=infobatch", "examples.rule=probe"], ["examples.rule=probe with examples.method=infobatch"]),
        (["examples.method=forgetting", "examples.rule=probe", "examples.probe_share=0"], ["examples.probe_share=0: must be > 0 and <= 1"]),
        (["examples.method=forgetting", "examples.rule=probe", "examples.prob_keep=0.5"], ["did you mean examples.probe_keep?"]),
        (["examples.method=forgetting", "examples.rule=probe", "examples.probe_keep=0.5"],
         ["examples.probe_keep=0.5 with tokens.method=all", "set examples.probe_keep=1"]),
        (["examples.method=forgetting", "examples.rule=probe", "examples.probe_keep=0.5", "tokens.method=tome", "tokens.keep=0.7",
          "tokens.merged=2"],
         ["examples.probe_keep=0.5 with tokens.merged=2"]),
        (["plan.plateaus=4"], ["plan.plateaus=4: not a setting of plan.method=constant", "plan.method=cosine"]),
        (["plan.method=cosine", "plan.stairs=[[1ep, 0.5, 0.5]]"], ["plan.stairs=", "plan.method=staircase"]),
        (["examples.method=forgetting", "examples.swap=1.0"], ["examples.swap=1.0: must be >= 0 and < 1"]),
        (["examples.method=forgetting", "examples.window=300step"], ["examples.window='300step'", "write it in epochs, e.g. '5ep'"]),
        (["examples.method=forgetting", "examples.window=30"], ["examples.window=30", "write epochs as '5ep'"]),
        (["examples.method=forgetting", "examples.ties=loss"], ["examples.ties='loss'", "unknown value; valid values: spread, id"]),
        (["examples.method=forgetting", "examples.balanced=often"], ["examples.balanced='often'", "must be true or false"]),
        (["tokens.method=topk", "tokens.keep=0"], ["tokens.keep=0: must be > 0 and <= 1"]),
        (["tokens.method=topk", "tokens.keeep=0.5"], ["tokens.keeep=0.5: unknown key; did you mean tokens.keep?"]),
        (["tokens.method=topk", "tokens.settings=1"], ["tokens.settings=1: unknown key"]),
        (["tokens.lr=1"], ["tokens.lr=1: unknown key; did you mean optim.lr?"]),
        (["tokens.method=topp"], ["tokens.method='topp': unknown value; valid values: all, topk, random, tome"]),
        (["plan.method=staircase"], ["plan.stairs=[]: use [from epoch, keep tokens, keep connections], epochs rising"]),
        (["plan.method=staircase", "plan.stairs=[[1ep, 0.5, 5]]"], ["plan.stairs.0.2=5: must be > 0 and <= 1"]),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_apply_is_refused_with_a_remedy(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        changed(*overrides, tmp_path=tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_the_settings_of_a_method_are_read_and_written(tmp_path: Path) -> None:
    words = ["examples.method=forgetting", "examples.window=4ep", "plan.method=staircase", "plan.stairs=[[2.5ep, 0.8, 1.0]]"]
    config = changed(*words, tmp_path=tmp_path)
    assert (config.examples.settings.window, config.examples.settings.swap) == (4.0, 0.05)
    assert config.plan.settings.stairs == ((2.5, 0.8, 1.0),)
    resolved = config.resolved()
    assert resolved["tokens"] == {"method": "all", "blocks": [3, 6, 9], "position": "attention"}
    assert resolved["plan"] == {"method": "staircase", "stairs": [["2.5ep", 0.8, 1.0]]}
    assert resolved["examples"]["window"] == "4ep" and "anneal" in resolved["examples"]
    assert parse(yaml.safe_load(yaml.safe_dump(resolved))) == config


def test_the_settings_of_the_rule_are_read_written_and_replaced_with_it(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    examples = {"method": "forgetting", "rule": "probe", "probe_share": 0.2, "probe_keep": 0.5}
    path.write_text(yaml.safe_dump(PLAIN | {"examples": examples, "tokens": {"method": "topk", "keep": 0.7}}))
    config = load(path)
    assert config.examples.probe is not None and config.examples.probe.plan == Plan(0.5)
    assert config.resolved()["examples"].items() >= examples.items() and parse(config.resolved()) == config
    other = load(path, ["examples.rule=dominant"])
    assert other.examples.probe is None and not other.resolved()["examples"].keys() & {"probe_share", "probe_keep"}
    assert "examples.probe_share" in differences(config, load(path, ["examples.probe_share=0.3"]))
    with pytest.raises(ConfigError, match=r"examples\.probe_share=0\.3: not a setting of examples\.rule=clear"):
        load(path, ["examples.rule=clear", "examples.probe_share=0.3"])


def test_a_method_on_the_command_line_replaces_the_files_and_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    examples = {"method": "forgetting", "removed": 0.2, "swap": 0.1}
    path.write_text(yaml.safe_dump(PLAIN | {"examples": examples, "tokens": {"method": "topk", "keep": 0.7, "fuse": True}}))
    config = load(path, ["examples.method=random_epoch", "tokens.method=all"])
    assert config.resolved()["examples"] == {
        "method": "random_epoch",
        "removed": 0.2,
        "balanced": False,
        "anneal": 0.0,
        "rule": "clear",
    }
    assert config.tokens.settings.off
    assert load(path, ["tokens.method=tome"]).tokens.settings.keep == 0.7, "what both methods have stays"
    with pytest.raises(ConfigError, match=r"examples\.swap=0\.3: not a setting of examples\.method=random_epoch"):
        load(path, ["examples.method=random_epoch", "examples.swap=0.3"])
    path.write_text(yaml.safe_dump(PLAIN | {"examples": examples | {"method": "infobatch"}}))
    with pytest.raises(ConfigError, match=r"examples\.swap=0\.1: not a setting of examples\.method=random_epoch"):
        load(path, ["examples.method=random_epoch"])  # the file's own mistake stays one


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"examples": {"method": "forgetting", "removed": 0.1, "window": "7ep"}, "plan": {"method": "cosine", "plateaus": 4}},
        {"tokens": {"method": "tome", "keep": 0.7, "fuse": True}, "connections": {"keep": 0.5}, "examples": {"swap": 0.3}},
        {"plan": {"method": "staircase", "stairs": [["1ep", 0.8, 0.7]]}, "tokens": {"method": "random"}},
    ],
)
def test_a_run_of_before_is_read_and_its_foreign_keys_are_dropped(changes: dict[str, Any], tmp_path: Path) -> None:
    """Whatever value they have: they had no effect. What applies is kept, and the same configuration written today is no other run."""
    raw = recorded(PLAIN, **changes)
    config = parse_recorded(raw, "config")
    for name in RECORDED:
        section, resolved = method_sections()[name], config.resolved()[name]
        assert {key: raw[name][key] for key in resolved} == resolved
        assert resolved.keys() <= {*section.own_keys(), *section.keys_of(raw[name]["method"])}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert load(path) == config and differences(load(path, ["log_every=3step"]), config) == {}
    assert parse(config.resolved()) == config and without_foreign(config.resolved()) == config.resolved()


def test_a_wrong_value_of_a_run_of_before_is_still_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokens\.keep=7: must be > 0 and <= 1"):
        parse_recorded(recorded(PLAIN, tokens={"method": "topk", "keep": 7}), "config")
    with pytest.raises(ConfigError, match=r"tokens\.kep=1: unknown key"):
        parse_recorded(recorded(PLAIN, tokens={"kep": 1}), "config")
    with pytest.raises(ConfigError, match=r"examples\.method='x': unknown value; valid values: all, forgetting"):
        parse_recorded(recorded(PLAIN, examples={"method": "x"}), "config")


@pytest.mark.parametrize(
    ("recipe", "overrides", "refused"),
    [
        ("quickstart", ["plan.stairs=[[0ep, 0.5, 0.5]]"], "plan.stairs"),
        ("tri_level_deit_small_0.7", ["plan.stairs=[]", "tokens.method=all", "tokens.keep=0.7"], "tokens.keep"),
        ("tri_level_deit_small_0.7", ["plan.stairs=[[0ep, 0.5, 0.5]]", "examples.method=infobatch", "examples.swap=0.2"], "examples.swap"),
    ],
)  # fmt: skip
def test_overrides_do_not_turn_a_configuration_into_an_old_record(recipe: str, overrides: list[str], refused: str) -> None:
    """The keys of a record were once looked for behind the overrides: one foreign key made all others pass."""
    with pytest.raises(ConfigError, match=rf"{refused}=.*: not a setting of "):
        load(ROOT / "configs" / f"{recipe}.yaml", overrides)
