"""Reads a configuration: YAML, `key.sub=value` overrides, and errors that name the key, the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config.errors import ConfigError, did_you_mean, same_name
from trainer.config.field_errors import reason
from trainer.config.method_section import CHOSEN, MethodSection
from trainer.config.pipes import ALLOW_HINT, refuse_grant_by_file
from trainer.config.recorded import method_sections, without_foreign
from trainer.config.run_config import Config
from trainer.config.run_defaults import with_recorded, with_run_defaults
from trainer.config.strict_yaml import load_yaml
from trainer.config.values import Section

_DEEPEST = 16  # parts of a key; model.args may hold mappings of its own


def load(path: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> Config:
    """Read a YAML strictly and apply `key.sub=value` overrides (values are YAML). Raises ConfigError.

    resume: the configuration continues a run, whose recorded values replace defaults that depend on the length of the run.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"config {path}: is a folder; name a YAML file, e.g. {path}/quickstart.yaml")
    if not path.is_file():
        hint = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")], prefix=f"{path.parent}/")
        raise ConfigError(f"config {path}: no such file" + (f"; {hint}" if hint else ""))
    try:
        raw = load_yaml(path.read_text())
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: not text in UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}; make it readable for this user") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from error
    if raw is None:
        raise ConfigError(f"config {path}: is empty; `trilevel init DATA` writes one for your data")
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path}: must be a mapping of keys to values, got {type(raw).__name__}")
    refuse_grant_by_file(raw, str(path))
    raw = without_foreign(raw)
    given = [_split(text) for text in overrides]
    _replace_methods(raw, given)
    for key, value in given:
        _override(raw, key, value)
    return parse(with_recorded(raw, method_sections()) if resume else raw, str(path))


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a run directory, with overrides. Raises ConfigError."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run}: no config.yaml; give the directory of a run, e.g. runs/NAME")
    return load(path, overrides)


def parse(raw: dict[str, Any], source: str = "config") -> Config:
    """Validate plain values as a Config. Raises ConfigError naming every wrong key, its value and similar keys."""
    try:
        return Config.model_validate(with_run_defaults(raw, method_sections()))
    except ValidationError as error:
        raise ConfigError("\n".join([f"{source}:"] + [_explain(e) for e in error.errors()])) from None


def parse_recorded(raw: dict[str, Any], source: str) -> Config:
    """A configuration as a run recorded it in its journal or a checkpoint; records of earlier versions hold keys of other methods,
    which had no effect. Raises ConfigError."""
    return parse(without_foreign(raw), source)


def _split(text: str) -> tuple[str, Any]:
    """`key.sub=value` as key and plain value."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: write it as key.sub=value, e.g. optim.lr=1e-3")
    if key == "data.allow_pipe":
        raise ConfigError(f"override {text!r}: not a setting of a run; to run the commands of pipe: shards, use {ALLOW_HINT}")
    try:
        parsed = load_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):  # glob and brace patterns are not valid YAML
        parsed = value
    if isinstance(parsed, dict) and not value.strip().endswith("}"):
        parsed = value
    return key, parsed


def _replace_methods(raw: dict[str, Any], given: list[tuple[str, Any]]) -> None:
    """If `section.method=NAME` (or `section.rule`) replaces the file's, drop the settings that the new one does not have."""
    for name, section in method_sections().items():
        for choice in section.choices():
            chosen = [value for key, value in given if key == f"{name}.{choice}"]
            there = raw.get(name)
            if not chosen or not isinstance(there, dict):
                continue
            before = there.get(choice, section.default_of(choice))
            mine, kept = (section.keys_of(str(method), choice) for method in (before, chosen[-1]))
            for key in mine:
                if key not in kept:
                    there.pop(key, None)


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    node = raw
    *parents, last = key.split(".")
    if len(parts := [*parents, last]) > _DEEPEST:
        raise ConfigError(f"override {key[:80]}...: a key has at most {_DEEPEST} parts, this one has {len(parts)}")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}={value}: {part} is a value, not a section, so it has no key {last!r}")
        node = child
    node[last] = value


def _explain(error: Any) -> str:
    where = [str(p) for i, p in enumerate(error["loc"]) if i != 1 or p not in CHOSEN.values()]
    key = ".".join(where)
    if error["type"] == "extra_forbidden":
        known = _keys(_section(where[:-1]))
        near = did_you_mean(where[-1], known, prefix="".join(f"{part}." for part in where[:-1]))
        hint = same_name(where[-1], _all_keys()) or near or f"valid keys: {', '.join(known)}"
        return f"  {key}={error['input']!r:.200}: unknown key; {hint}"
    if error["type"] == "missing" and not isinstance(error["loc"][-1], int):
        return f"  {key}: required key is missing; add it to the file or pass {key}=VALUE"
    if error["type"] == "missing":  # a value of a list
        key = ".".join(where[:-1])
    message = reason(error)
    if not key or message.startswith(key):  # the message names its keys
        return f"  {message}"
    return f"  {key}={error['input']!r:.200}: {message}"


def _section(parts: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in parts:
        found = section.model_fields.get(part)
        kind = found.annotation if found else None
        for option in (kind, *get_args(kind)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                section = option
                break
    return section


def _keys(section: type[BaseModel]) -> list[str]:
    return (
        section.all_keys()
        if issubclass(section, MethodSection)
        else [f.alias or name for name, f in section.model_fields.items()]
    )


def _all_keys() -> list[str]:
    keys = []
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += [f"{name}.{k}" for k in _keys(kind)]
        else:
            keys.append(name)
    return keys
