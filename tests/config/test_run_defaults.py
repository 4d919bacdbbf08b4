"""Defaults that are shares of the run: every mechanism acts in a short run, long runs have the papers' numbers, old runs keep theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config.test_config import PLAIN
from tests.support.recorded_configs import recorded
from trainer.config.errors import ConfigError
from trainer.config.load import load, parse, parse_recorded
from trainer.run.ineffective import refuse_ineffective

FORGETTING: dict[str, Any] = {"method": "forgetting", "removed": 0.1}
PROBED = FORGETTING | {"rule": "probe"}
TOPK = {"tokens": {"method": "topk", "keep": 0.5}, "plan": {"method": "cosine"}}


@pytest.mark.parametrize(
    ("epochs", "repeats", "window", "updates"),
    [
        (300, 1, 30, 5),
        (300, 3, 30, 5),
        (100, 1, 10, 5),
        (100, 3, 9, 5),
        (40, 1, 4, 5),
        (8, 1, 3, 1),
        (5, 1, 3, 1),
        (20, 3, 9, 1),
    ],
)
def test_the_window_is_a_tenth_of_the_run_and_holds_a_score(epochs: int, repeats: int, window: float, updates: int):
    """300 epochs: the 30 and 5 of the paper's code. Windows are whole passes over the images, three at least."""
    data = PLAIN["data"] | {"repeats": repeats, "batch": 96}
    config = parse(PLAIN | {"epochs": epochs, "data": data, "examples": FORGETTING})
    assert (config.examples.settings.window, config.examples.settings.updates) == (window, updates)
    assert window % repeats == 0 and window / repeats >= 3
    refuse_ineffective(config)


@pytest.mark.parametrize(("epochs", "given", "window", "share"), [
    (300, {}, 30, 0.1), (8, {}, 3, 1.0), (100, {}, 10, 0.3), (100, {"probe_share": 0.1}, 30, 0.1), (40, {"window": "7ep"}, 7, 0.4286),
])  # fmt: skip
def test_the_probe_observes_an_example_three_times_in_a_window(epochs: int, given: dict[str, Any], window: float, share: float):
    config = parse(PLAIN | {"epochs": epochs, "examples": PROBED | given})
    probe = config.examples.probe
    assert probe is not None and (config.examples.settings.window, probe.probe_share) == (window, share)
    assert window * share >= 3


@pytest.mark.parametrize("epochs", [2, 8, 30, 300])
def test_keep_ratios_and_warm_up_follow_the_length_of_the_run(epochs: int):
    config = parse(PLAIN | {"epochs": epochs} | TOPK)
    plan = config.plan.settings
    assert plan.warmup == pytest.approx(epochs / 30, abs=1e-3) and plan.length == pytest.approx(epochs / 3, abs=1e-3)
    assert config.optim.warmup == min(5, epochs / 10)
    refuse_ineffective(config)


def test_what_is_given_stays_and_what_is_stored_is_complete(tmp_path: Path):
    given = {"optim": {"warmup": "2ep"}, "plan": {"method": "cosine", "warmup": "1ep", "length": "4ep"}}
    config = parse(PLAIN | {"epochs": 40} | TOPK | given | {"examples": FORGETTING | {"window": "7ep", "updates": 2}})
    assert (config.optim.warmup, config.plan.settings.warmup, config.plan.settings.length) == (2, 1, 4)
    assert (config.examples.settings.window, config.examples.settings.updates) == (7, 2)
    stored = parse(PLAIN | {"epochs": 8, "examples": FORGETTING} | TOPK).resolved()
    assert (stored["examples"]["window"], stored["optim"]["warmup"], stored["plan"]["warmup"]) == ("3ep", "0.8ep", "0.267ep")
    assert parse(stored).resolved() == stored
    old = parse_recorded(recorded(PLAIN | {"epochs": 40, "optim": {"warmup": "5ep"}}, examples=FORGETTING), "old")
    assert old.examples.settings.window == 30 and old.examples.settings.updates == 5 and old.optim.warmup == 5


def test_a_run_of_an_earlier_version_continues_with_its_own_defaults(tmp_path: Path):
    """Its file gives no window, and the default was 30 epochs; what is given on the command line is compared as before."""
    run = PLAIN | {"runs": str(tmp_path), "epochs": 40, "examples": FORGETTING} | TOPK
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(run))
    before = parse(run | {"optim": {"warmup": "5ep"}}).resolved()
    before["examples"] |= {"window": "30ep", "updates": 5}
    before["plan"] |= {"warmup": "10ep", "length": "100ep"}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text(yaml.safe_dump(before))
    assert load(file, resume=True).resolved() == before
    assert load(file, ["examples.window=6ep"], resume=True).examples.settings.window == 6
    assert load(file).examples.settings.window == 4
    assert load(file, ["name=other"], resume=True).examples.settings.window == 4, "another run"
    other = load(file, ["examples={method: infobatch, removed: 0.3}"], resume=True)
    assert other.examples.method == "infobatch"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"epochs": "ten"}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"data": 3}, "data"),
        ({"optim": [1]}, "optim"),
        ({"examples": FORGETTING | {"window": "x"}}, "examples.window='x'"),
        ({"examples": PROBED | {"probe_share": 0}}, "examples.probe_share=0"),
        ({"examples": {"method": "none", "rule": 3}}, "examples.method='none'"),
        ({"plan": "cosine"}, "plan"),
    ],
)
def test_wrong_values_are_refused_as_before(changes: dict[str, Any], key: str):
    with pytest.raises(ConfigError, match=key):
        parse(PLAIN | changes)
