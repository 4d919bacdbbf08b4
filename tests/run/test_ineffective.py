"""A mechanism that would never act is refused before training; what acts in part is in `--check`, on the console and in the report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.preflight.test_check import config as on_digits
from tests.support.journals import lines, write
from tests.support.vits import tiny
from trainer.analysis.report.summary import summary
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.config.run_config import Config
from trainer.preflight.check import check
from trainer.run.ineffective import absent_ranks, ineffective, refuse_ineffective, rounded_shares, unused_pixels
from trainer.train import train

DATA = {"train": "a", "validation": "b", "batch": 64, "lanes": 4}
FORGETTING: dict[str, Any] = {"method": "forgetting", "removed": 0.1}
TOKENS = {"method": "topk", "keep": 0.5}
IMAGES = 640  # 10 steps in an epoch


def config(**changes: Any) -> Config:
    data = DATA | changes.pop("data", {})
    return parse({"name": "x", "epochs": 8, "control": 0, "model": {"name": "deit_tiny_patch16_224"}, "data": data} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"examples": FORGETTING | {"window": "30ep"}}, ["examples.window=30ep: no update", "set examples.window<=7ep, or", "epochs=8"]),
        ({"examples": FORGETTING | {"window": "8ep"}}, ["no update happens in the 8 epochs", "examples.method=random_fixed"]),
        ({"examples": FORGETTING | {"window": "4ep", "anneal": 0.5}}, ["in the 4 epochs that leave examples out", "window<=3ep"]),
        ({"examples": FORGETTING, "epochs": 3}, ["examples.window=3ep", "train for more epochs"]),
        ({"examples": FORGETTING | {"window": "9ep"}, "data": {"repeats": 3, "batch": 96}}, ["examples.window=9ep", "more epochs"]),
        ({"examples": {"method": "infobatch", "removed": 0.3}, "epochs": 1}, ["examples.method=infobatch: the first 1 epoch"]),
        ({"examples": {"method": "random_epoch", "removed": 0.3, "anneal": 0.99}}, ["examples.anneal=0.99: all 8 epochs"]),
        ({"tokens": TOKENS, "plan": {"method": "cosine", "warmup": "8ep"}}, ["plan.method=cosine, plan.warmup=8ep", "shorten the plan"]),
        ({"tokens": TOKENS, "plan": {"method": "staircase", "stairs": [["9ep", 0.5, 1.0]]}}, ["plan.stairs from epochs 9"]),
        ({"tokens": TOKENS, "plan": {"method": "dense_sparse_epochs"}, "epochs": 1}, ["its first epoch is dense"]),
        ({"weights": {"method": "magnitude", "keep": 0.5, "groups": "heads", "block": [8, 8]}},
         ["weights.block=[8, 8]: not a setting of weights.groups=heads", "weights.groups=columns|rows, or remove weights.block"]),
    ],
)  # fmt: skip
def test_a_mechanism_that_never_acts_is_refused(changes: dict[str, Any], words: list[str]):
    with pytest.raises(ConfigError) as error:
        refuse_ineffective(config(**changes))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"examples": FORGETTING | {"window": "7ep", "updates": 1}},
        {"examples": {"method": "forgetting"}},  # counts events only
        {"examples": {"method": "infobatch", "removed": 0.3}, "epochs": 2},
        {"tokens": TOKENS, "plan": {"method": "cosine", "warmup": "1ep", "length": "3ep", "plateaus": 2}},
        {"tokens": TOKENS, "plan": {"method": "staircase", "stairs": [["7ep", 0.5, 1.0]]}},
        {"tokens": TOKENS, "plan": {"method": "dense_sparse"}},
        {"tokens": TOKENS, "plan": {"method": "dense_sparse_epochs"}, "epochs": 2},
        {"evaluate": {"every": "8ep"}, "checkpoint": {"every": "80step"}, "stop_at": "8ep", "log_every": "500step"},
        {"weights": {"method": "magnitude", "keep": 0.5, "groups": "heads"}},
        {"weights": {"method": "magnitude", "keep": 0.5, "groups": "rows", "block": [8, 8]}},
        {"engine": {"kind": "ddp"}, "augment": {"crop": "shift", "shift": 2}, "trace": {"steps": [1, 2], "memory": True}},
        {"engine": {"zero": 3, "deepspeed": "ds.json"}, "augment": {"scale": [0.5, 1.0]}, "optim": {"betas": [0.9, 0.95]}},
        {"engine": {"kind": "ddp", "zero": 0}, "optim": {"name": "lookahead_adamw", "betas": [0.9, 0.95]}},
    ],
)
def test_what_acts_is_neither_refused_nor_reported(changes: dict[str, Any]):
    refuse_ineffective(config(**changes))
    assert ineffective(config(**changes), IMAGES) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"examples": FORGETTING | {"window": "3ep", "updates": 5}},
         "examples.updates=5 with examples.window=3ep: 2 of them in the 8 epochs"),
        ({"examples": {"method": "infobatch", "removed": 0.3, "anneal": 0.05}}, "examples.anneal=0.05 of 8 epochs is none"),
        ({"data": {"repeats": 3, "batch": 96}, "epochs": 2}, "data.repeats=3 with epochs=2: only 2 of 3 images are ever shown"),
        ({"tokens": {"method": "topk"}}, "tokens.method=topk: the keep ratio is 1 in the whole run"),
        ({"plan": {"method": "cosine"}}, "plan.method=cosine has no effect with tokens.method=all"),
        ({"tokens": TOKENS, "plan": {"method": "cosine", "length": "100ep"}},
         "plan.length=100ep: at the end of epochs=8 the keep ratios are tokens 0.995, connections 1; the plan ends at 0.5, 1"),
        ({"tokens": TOKENS, "plan": {"method": "cosine", "length": "1ep", "plateaus": 20}}, "the shortest plateau lasts 0.5 steps"),
        ({"tokens": TOKENS, "plan": {"method": "cosine", "length": "6ep"}, "control": 0.01},
         "the longest plateau has 17 steps, timing dense passes needs 26"),
        ({"weights": {"method": "admm"}}, "weights.method=admm: weights.keep=1, so all weights are kept; set weights.keep below 1"),
        ({"optim": {"ema": 0.999}}, "optim.ema=0.999 over 80 steps: 92% of the average is still the initial weights; set optim.ema<=0.96"),
        ({"optim": {"lr": 5e-6}}, "optim.min_lr=1e-05 is above optim.lr=5e-06: the learning rate rises to it; set optim.min_lr below"),
        ({"examples": FORGETTING | {"updates": 0}}, "examples.updates=0: no example is ever exchanged, so the same ones are left out"),
        ({"examples": FORGETTING | {"swap": 0.0}}, "examples.swap=0: no example is ever exchanged, so the same ones are left out for the"),
        ({"evaluate": {"every": "9ep"}},
         "evaluate.every=9ep is longer than the run (8 epochs, about 80 steps): one evaluation, at the end"),
        ({"checkpoint": {"every": "81step"}}, "checkpoint.every=81step is longer than the run"),
        ({"checkpoint": {"keep_every": "100ep"}}, "checkpoint.keep_every=100ep"),
        ({"stop_at": "0step"}, "stop_at=0step: the run ends before its first step"),
        ({"stop_at": "20ep"}, "stop_at=20ep is behind the end"),
        ({"trace": {"steps": [100, 105]}}, "trace.steps=[100, 105] begins behind the end"),
        ({"engine": {"kind": "ddp", "zero": 2}}, "engine.zero=2 has no effect with engine.kind=ddp; set engine.zero=0 or engine.kind="),
        ({"engine": {"kind": "ddp", "deepspeed": "ds.json"}}, "engine.deepspeed=ds.json has no effect with engine.kind=ddp"),
        ({"trace": {"memory": True}}, "trace.memory=true has no effect without trace.steps; set it to the first and last step"),
        ({"trace": {"ranks": [0, 1]}}, "trace.ranks=[0, 1] has no effect without trace.steps"),
        ({"augment": {"shift": 2}}, "augment.shift=2 has no effect with augment.crop=rrc; set augment.crop=shift"),
        ({"augment": {"crop": "none", "scale": [0.5, 1.0]}}, "augment.scale=[0.5, 1.0] has no effect with augment.crop=none"),
        ({"augment": {"crop": "src", "ratio": [0.5, 2.0]}}, "augment.ratio=[0.5, 2.0] has no effect with augment.crop=src"),
        ({"optim": {"name": "sgd", "eps": 1e-3}}, "optim.eps=0.001 has no effect with optim.name=sgd, which has no eps"),
        ({"optim": {"warmup": "0ep", "warmup_lr": 1e-4}}, "optim.warmup_lr=0.0001 has no effect with optim.warmup=0ep"),
        ({"optim": {"warmup_lr": 0.1}}, "optim.warmup_lr=0.1 is above optim.lr=0.001: the learning rate falls to it"),
        ({"augment": {"mixup": 0.8, "mix_switch": 0.9}}, "augment.mix_switch=0.9 has no effect unless augment.mixup and augment.cutmix"),
        ({"augment": {"mix_probability": 0.3}}, "augment.mix_probability=0.3 has no effect without augment.mixup or augment.cutmix"),
        ({"augment": {"policy_on": "device"}}, "augment.policy_on=device has no effect with augment.policy=none"),
        ({"examples": {"method": "random_fixed"}}, "examples.removed=0: every epoch shows every example; set examples.removed above 0"),
        ({"examples": {"method": "infobatch", "removed": 0.95, "anneal": 0.2}}, "may leave 32 of 640 images, fewer than data.batch=64"),
        ({"optim": {"name": "sgd", "betas": [0.9, 0.95]}}, "optim.betas=[0.9, 0.95] has no effect with optim.name=sgd, which has no"),
    ],
)  # fmt: skip
def test_what_acts_in_part_is_reported(changes: dict[str, Any], words: str):
    found = ineffective(config(**changes), IMAGES)
    assert len(found) == 1 and words in found[0]


def test_ranks_that_the_run_has_not_are_named():
    trace = config(trace={"steps": [1, 2], "ranks": [0, 1, 7]}).trace
    assert absent_ranks(trace, 8) == absent_ranks(config(trace={"ranks": [7]}).trace, 1) == []
    assert absent_ranks(trace, 1) == ["trace.ranks=[0, 1, 7] with 1 process(es): no trace of rank 1, 7; ranks begin at 0"]


def test_check_and_a_new_run_refuse_and_a_resumed_one_goes_on(digits: Path, tmp_path: Path):
    wrong = on_digits(digits, examples=FORGETTING | {"window": "30ep"}, runs=str(tmp_path))
    with pytest.raises(ConfigError, match=r"examples\.window=30ep: no update happens"):
        check(wrong, 1)
    with pytest.raises(ConfigError, match=r"examples\.window=30ep: no update happens"):
        train(wrong)
    with pytest.raises(ConfigError, match=r"examples\.window=30ep: no update happens"):
        train(wrong, resume=True)  # as launchers start a new run
    write(wrong.directory(), [])
    with pytest.raises(ConfigError, match="frozen_by_test"):  # behind the check, which a run of an earlier version passes
        train(wrong.changed(model={"name": "frozen_by_test"}), resume=True)


def test_pixels_that_no_patch_covers_are_named():
    """60 pixels in patches of 8: timm drops the last four rows and columns."""
    size = partial(tiny, patch_size=8)
    assert unused_pixels(size(img_size=64)) == []
    assert unused_pixels(size(img_size=60)) == [
        "model.image_size=60 is not a multiple of the patch size 8: 4 rows and columns of pixels are not used; set 56 or 64"
    ]
    assert unused_pixels(size(img_size=60, dynamic_img_pad=True, dynamic_img_size=True)) == []


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            {"groups": "heads", "keep": 0.75},
            "weights.keep=0.75: at most 3 heads per block, rounded up in each, so nothing is pruned; set",
        ),
        ({"block": [64, 1], "keep": 0.5}, "at most 1 columns per block, rounded up in each, so nothing is pruned"),
        ({"block": [8, 5], "keep": 0.5}, "at most 5 columns per block, rounded up in each, so 0.59 of them stay"),
        ({"groups": "units", "keep": 0.5}, ""),
        ({"block": [8, 5], "keep": 0.5, "per": "layer"}, ""),
        ({}, ""),
    ],
)
def test_a_share_that_rounding_raises_is_reported(weights: dict[str, Any], words: str):
    found = rounded_shares(config(weights={"method": "magnitude", "prune": "4ep"} | weights), tiny())
    assert len(found) == bool(words) and words in "".join(found)


def test_check_and_the_report_show_what_acts_in_part(digits: Path, tmp_path: Path):
    text = check(on_digits(digits, evaluate={"every": "10ep"}), 1).text()
    assert text.splitlines()[-1].startswith("warning: evaluate.every=10ep is longer than the run (4 epochs, about 88 steps)")
    start, *others = lines()
    warning = "evaluate.every=10ep is longer than the run"
    rows = summary(write(tmp_path / "tri", [start | {"warnings": [warning]}, *others])).rows
    assert [row.note for row in rows if row.what == "warning"] == [warning]
    assert not any(row.what == "warning" for row in summary(write(tmp_path / "plain", lines())).rows)
