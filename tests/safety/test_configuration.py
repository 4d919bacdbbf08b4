"""Configurations that mean something else than they look like, or that cannot be: refused with key, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.config.strict_yaml import load_yaml

PLAIN = "name: x\nmodel: {name: deit_tiny_patch16_224}\ndata: {train: a.tar, validation: b.tar}\n"


def read(tmp_path: Path, text: str, *overrides: str) -> Any:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load(path, list(overrides))


@pytest.mark.parametrize(
    "more",
    ["optim: {lr: 1e-3}\nseed: 1\noptim: {ema: 0.9}\n", "seed: 1\nseed: 2\n", "optim: {lr: 1e-3, lr: 2e-3}\n"],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, more: str) -> None:
    """PyYAML takes the last one: a whole first `optim:` section was dropped."""
    with pytest.raises(ConfigError, match=r"line \d: the key '(optim|seed|lr)' is given twice, first in line \d"):
        read(tmp_path, PLAIN + more)


@pytest.mark.parametrize(
    ("text", "value"), [("1:30", "1:30"), ("017", 17), ("yes", "yes"), ("on", "on"), ("1e-3", 1e-3), ("1_000", "1_000")]
)
def test_words_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    assert load_yaml(text) == value and type(load_yaml(text)) is type(value)
    assert load_yaml("[1, -2, +3, 0, 1.5, .5, true, null, ~, 2024-13-45]") == [
        1,
        -2,
        3,
        0,
        1.5,
        0.5,
        True,
        None,
        None,
        "2024-13-45",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "epochs=1:30", "epochs=true", "seed=true", "optim.lr=true", "data.batch=yes", "epochs=2024-13-45", "epochs=１２", "data.batch=1_28",
        "data.batch='128'", "optim.lr='1e-3'", "optim.lr=１e-3", "augment.mean=[true, 0, 0]", "augment.std=[1, 1, '1']", "optim.ema='0.9'",
        "optim.betas=[0.9, true]", "trace.ranks=[true]", "checkpoint.every=１0step", "checkpoint.every=1_0ep", "optim.warmup=１ep",
        "evaluate.every=nanep",
    ],
)  # fmt: skip
def test_a_number_must_be_a_number(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        read(tmp_path, PLAIN, override)


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=.inf", "optim.eps=.inf", "optim.eps=.nan", "optim.weight_decay=.inf", "optim.clip=.inf", "optim.min_lr=.inf",
        "augment.mixup=.inf", "augment.cutmix=.inf", "augment.color_jitter=.inf", "data.cache_size=.inf", "augment.mean=[.nan, 0, 0]",
        "augment.std=[0, 0, 0]", "augment.std=[1, 1, -1]", "augment.scale=[1, 0]", "augment.scale=[-5, 9]", "augment.ratio=[0, 0]",
        "augment.ratio=[2, 1]", "data.cache_size=1e300", "data.workers=10000000",
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, override: str) -> None:
    """eps=inf trained nothing, without a message; the others skipped every step or ended in a worker."""
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        read(tmp_path, PLAIN, override)


@pytest.mark.parametrize(
    "key",
    ["checkpoint_path", "pretrained", "pretrained_cfg_overlay", "pretrained_cfg", "cache_dir", "features_only", "scriptable"],
)
def test_arguments_of_the_model_load_no_file(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.args\.{key}=.*load weights with model\.init=FILE"):
        read(tmp_path, PLAIN, f"model.args={{{key}: evil.pth}}")


def test_a_plain_configuration_is_read_as_before(tmp_path: Path) -> None:
    config = read(
        tmp_path, PLAIN + "optim: {lr: 1e-3, betas: [0.9, 0.95]}\nepochs: 100\nengine: {compile: true}\n", "augment.flip=0"
    )
    assert (config.optim.lr, config.optim.betas, config.epochs, config.engine.compile) == (1e-3, (0.9, 0.95), 100, True)
    assert config.augment.flip == 0.0


def test_merge_keys_still_work(tmp_path: Path) -> None:
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")["b"] == {"x": 1, "y": 3}


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    """Eight lines were 10^8 values in an error message: minutes and gigabytes."""
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    laughs += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(ConfigError, match=r"1,2\d\d,\d\d\d,\d\d\d values once its aliases .* must be <= 100,000"):
        read(tmp_path, PLAIN + laughs)
    with pytest.raises(ConfigError, match=r"contains an alias .* of itself"):
        read(tmp_path, PLAIN + "tracking: {tags: &t {a: *t}}\n")
    assert load_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_messages_stay_short(tmp_path: Path) -> None:
    for override in ("seed=[" + "1," * 5000 + "]", ".".join(["a"] * 10_000) + "=1", "name=" + "[" * 5000):
        with pytest.raises(ConfigError) as refused:
            read(tmp_path, PLAIN, override)
        assert len(str(refused.value)) < 1000


def test_a_seed_that_no_generator_takes_is_refused(tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN, f"seed={2**63 - 1}").seed == 2**63 - 1
    with pytest.raises(ConfigError, match="seed="):
        read(tmp_path, PLAIN, f"seed={2**64}")
