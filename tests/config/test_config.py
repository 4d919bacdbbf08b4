"""The configuration: strict, with the nearest key in the error, durations with units, the same run after a round trip."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
import yaml
from pydantic_core import core_schema

from trainer.config.errors import ConfigError
from trainer.config.field_errors import reason
from trainer.config.load import load, parse
from trainer.config.run_config import Config, differences
from trainer.config.schema import DataConfig
from trainer.config.schema_run import EngineConfig

PLAIN = {"name": "x", "model": {"name": "deit_tiny_patch16_224"}, "data": {"train": "a", "validation": "b"}}


def changed(*overrides: str, tmp_path: Path) -> Config:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    return load(path, list(overrides))


def test_what_is_resolved_gives_the_same_run_again(tmp_path: Path) -> None:
    config = changed("optim.lr=1e-3", "optim.warmup=2.5ep", "tokens.blocks=[2, 5]", "stop_at=7step", tmp_path=tmp_path)
    assert (config.optim.lr, config.optim.warmup, config.tokens.blocks) == (1e-3, 2.5, (2, 5))
    again = parse(yaml.safe_load(yaml.safe_dump(config.resolved())))
    assert again == config and again.fingerprint() == config.fingerprint()


def test_a_resolved_length_is_exact(tmp_path: Path) -> None:
    """Seven digits and thirds: a replay reads config.yaml, and must find the same plan and the same last step."""
    config = changed(
        "stop_at=1234567step", "plan.method=cosine", "plan.length=33.333333333ep", "optim.warmup=2.0000001ep", tmp_path=tmp_path
    )
    resolved = config.resolved()
    assert (resolved["stop_at"], resolved["plan"]["length"]) == ("1234567step", "33.333333333ep")
    assert parse(resolved) == config


@pytest.mark.parametrize(
    "words",
    [
        ["tokens.method=topk", "tokens.keep=0.7"],
        ["connections.method=exact", "connections.keep=0.3"],
    ],
)
def test_stairs_that_end_elsewhere_than_the_keep_are_refused(words: list[str], tmp_path: Path) -> None:
    stairs = ["plan.method=staircase", "plan.stairs=[[0ep, 0.8, 0.8], [2ep, 0.6, 0.4]]"]
    with pytest.raises(ConfigError, match=r"plan.method=staircase, which ends at 0\.[64]; remove"):
        changed(*stairs, *words, tmp_path=tmp_path)
    assert changed(*stairs, words[0], tmp_path=tmp_path).plan.settings.stairs[1][1:] == (0.6, 0.4)
    merging = changed(*stairs, "tokens.method=tome", tmp_path=tmp_path)
    assert merging.tokens.settings.keep == 1.0, "the stairs decide how much is merged"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", "optim.learning_rate=1: unknown key; did you mean optim.warmup_lr?|valid keys"),
        ("data.lr=3", "did you mean optim.lr?"),
        ("modle.name=x", "did you mean model?"),
        ("augment.mean=[123, 116, 103]", "augment.mean.0=123: must be <= 1"),
        ("optim.name=adamx", "did you mean adamax? Or set engine.zero=0"),
        ("augment.shift=224", "augment.shift=224: must be < model.image_size=224"),
        ("model.drop_path=1", "model.drop_path=1: must be < 1"),
        ("lanes=2", "lanes=2: unknown key; did you mean data.lanes?"),
        ("weight_decay=2", "did you mean optim.weight_decay?"),
        (
            "model.args={patch_size:7}",
            "model.args.patch_size:7=null: timm leaves out arguments without a value; remove it; write {patch_size: 7}",
        ),
        ("model.args={depth: null}", "model.args.depth=null: timm leaves out"),
        ("evaluate.crop_pct=0", "evaluate.crop_pct=0: must be > 0"),
        ("epochs=0", "epochs=0: must be > 0"),
        ("epochs=1.5", "epochs=1.5: must be an integer"),
        ("optim.lr=fast", "optim.lr='fast': must be a number"),
        ("optim.lr=.inf", "optim.lr=inf: must be a finite number"),
        ("optim.layer_decay=2", "optim.layer_decay=2: must be <= 1"),
        ("engine.kind=fsdp", "engine.kind='fsdp': unknown value; valid values: deepspeed, ddp"),
        ("engine.compile=maybe", "engine.compile='maybe': must be true or false"),
        ("data.cache=4", "data.cache=4: must be text; put it in quotes"),
        ("model=3", "model=3: must be a section"),
        ("tracking.tags=[1]", "tracking.tags=[1]: must be a mapping of keys to values"),
        ("augment.scale=[0.1]", "augment.scale=[0.1]: value 2 is missing"),
        ("augment.scale=[0.1, 0.2, 0.3]", "augment.scale=[0.1, 0.2, 0.3]: must have 2 values, got 3"),
        ("trace.ranks=0", "trace.ranks=0: must be a list, e.g. [1, 2]"),
        ("tokens.blocks=[1, x]", "tokens.blocks.1='x': must be an integer"),
        ("optim.warmup=500step", "write it in epochs, e.g. '5ep'"),
        ("optim.warmup=5", "write epochs as '5ep' or optimizer steps as '500step'"),
        ("optim.warmup=5.0", "write epochs as '5ep' or optimizer steps as '500step'"),
        ("log_every=1.5step", "is not a duration"),
        ("optim.warmup=300ep", "optim.warmup=300ep: must be < epochs=300"),
        ("data.batch=1000", "must be a multiple of data.lanes x data.repeats = 16 x 1"),
        ("data.micro_batch=31", "both must be even"),
        ("tokens.blocks=[3, 3]", "unique, in ascending order"),
        ("tokens.blocks=[3, 1]", "unique, in ascending order"),
        ("engine.zero=4", "engine.zero=4"),
        ("optim.name=lamb", "set engine.zero=0"),
        ("name=../x", "name='../x': must be letters, digits"),
        ("tokens.method=tome", "merges nothing"),
        ("optim.name=lars", "set engine.zero=0"),
        ("optim.name=muon", "set engine.zero=0"),
        ("optim.betas=[1.5, 0.9]", "optim.betas.0=1.5"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_a_remedy(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        changed(override, tmp_path=tmp_path)
    assert any(part in str(error.value) for part in words.split("|")), error.value


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.kind=ddp", "engine.precision=bf16"),
        ("engine.zero=0", "engine.precision=bf16"),
        ("engine.zero=3", "engine.compile=true"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_it_starts(overrides: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        changed(*overrides, tmp_path=tmp_path)
    assert all(text.split("=")[1].lower() in str(error.value).lower() for text in overrides), error.value


def test_numbers_texts_and_lists_are_refused_in_our_words_whatever_pydantic_says() -> None:
    """Every type of error that pydantic has about them, also those that a later release adds."""
    of_values = re.compile(r"int_|float_|bool_|string_type|(list|dict|tuple|model)_type|finite|literal|(greater|less)_than")
    kinds = [kind for kind in typing.get_args(core_schema.ErrorType) if of_values.match(kind)]
    about = {"msg": "pydantic's own", "loc": ("a",), "ctx": {"gt": 1, "ge": 1, "lt": 1, "le": 1, "expected": "'a' or 'b'"}}
    assert len(kinds) > 15 and not [kind for kind in kinds if "pydantic" in reason({"type": kind, **about})]


def test_a_pattern_needs_no_quotes(tmp_path: Path) -> None:
    assert changed("data.train=*.tar", tmp_path=tmp_path).data.train == "*.tar"
    assert changed("data.train={a,b}.tar", tmp_path=tmp_path).data.train == "{a,b}.tar"


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        changed("epochs=0", "tokens.method=topk", "tokens.keep=2", "optim.lrr=1", "plan.plateaus=3", tmp_path=tmp_path)
    for text in (
        "epochs=0",
        "tokens.keep=2: must be > 0 and <= 1",
        "optim.lrr=1: unknown key; did you mean optim.lr?",
        "plan.plateaus=3",
    ):
        assert text in str(error.value)


def test_a_missing_file_and_a_missing_key(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"did you mean .*quickstart\.yaml"):
        load(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match="model: required key is missing"):
        load(tmp_path / "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"write it as key\.sub=value"):
        load(tmp_path / "quickstart.yaml", ["--lr"])


def test_a_resume_may_change_where_it_runs_and_not_what_is_computed(tmp_path: Path) -> None:
    ours = changed(tmp_path=tmp_path)
    same = changed(
        "data.workers=1", "data.micro_batch=8", "engine.zero=3", "log_every=1step", "data.train=elsewhere", tmp_path=tmp_path
    )
    assert differences(same, ours) == {} and same.fingerprint() == ours.fingerprint()
    other = changed("optim.lr=0.5", "engine.precision=bf16", tmp_path=tmp_path)
    assert differences(other, ours) == {"engine.precision": ("bf16", "autocast"), "optim.lr": (0.5, 1e-3)}
    assert other.fingerprint() != ours.fingerprint()


def test_of_two_overrides_of_a_method_the_last_decides_which_settings_stay() -> None:
    """The file's `keep` is of topk and tome, not of `all`."""
    last = load("configs/quickstart.yaml", ["tokens.method=all", "tokens.method=tome", "tokens.blocks=[1, 3]"])
    assert last.tokens.method == "tome" and last.tokens.settings.final_keep == 0.7
    assert load("configs/quickstart.yaml", ["tokens.method=tome", "tokens.method=all"]).tokens.method == "all"


def test_a_stalled_worker_is_named_before_the_other_ranks_give_up() -> None:
    assert 360 < DataConfig.model_fields["timeout"].default < EngineConfig.model_fields["timeout"].default, (
        "360 s: a store's retries"
    )


def test_a_folder_and_an_empty_file_are_named(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"empty.yaml: is empty; `trilevel init DATA` writes one"):
        load(tmp_path / "empty.yaml")
    with pytest.raises(ConfigError, match="is a folder; name a YAML file"):
        load(tmp_path)
