"""Reads the YAML files that the launcher needs: configurations (name and folder of their runs) and studies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from launch.job import LaunchError, near

_MOST_VALUES = 100_000  # ten aliases of ten aliases ...: nine such lines would be 10^9 values


class _Texts(yaml.SafeLoader):
    """Scalars are texts, but for null; with merge keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


def _resolve(loader: type[_Texts], kind: str, pattern: str, first: list[str]) -> None:
    loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first)


_resolve(_Texts, "null", "~|null|Null|NULL|", ["~", "n", "N", ""])
_resolve(_Texts, "merge", "<<", ["<"])


class _Values(_Texts):
    """Scalars by the rules of YAML 1.2, as the trainer reads them; PyYAML's own are those of 1.1: `yes` is true, `1:30` is 90."""


_resolve(_Values, "bool", "true|True|TRUE|false|False|FALSE", list("tTfF"))
_resolve(_Values, "int", r"[-+]?[0-9]+", list("-+0123456789"))
_resolve(_Values, "float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+0123456789."))


def _integer(loader: _Values, node: Any) -> int:
    return int(loader.construct_scalar(node))  # PyYAML reads 017 as octal


_Values.add_constructor("tag:yaml.org,2002:int", _integer)


def read(kind: str, file: str, example: str, texts: bool = False) -> Any:
    """The content of a YAML file. kind: "config" or "study"; example: a path that would be valid; texts: every value as it stands there.
    Raises LaunchError."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and (number := _expanded(node, {})) > _MOST_VALUES:
            raise yaml.YAMLError(f"{number:,} values once its aliases (*name) are expanded, must be <= {_MOST_VALUES:,}")
        content = yaml.load(text, Loader=_Texts if texts else _Values)
    except FileNotFoundError as error:
        others = [str(other) for other in path.parent.glob("*.yaml")]
        raise LaunchError(f"{kind} {file}: no such file{near(file, others) if others else ''}") from error
    except OSError as error:
        raise LaunchError(f"{kind} {file}: {error.strerror}; give a YAML file, e.g. {example}") from error
    except UnicodeDecodeError as error:
        raise LaunchError(f"{kind} {file}: not UTF-8 text; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LaunchError(f"{kind} {file}: not valid YAML: {error}") from error
    if node is not None:
        _refuse_twice(f"{kind} {file}", node, set())
    return content


def value_of(text: str) -> str:
    """The text that the trainer reads of the value of an override: without quotes and comments. Raises LaunchError."""
    try:
        value = yaml.load(text, Loader=_Texts)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LaunchError(f"{text!r}: not a YAML value: {error}") from error
    return value if isinstance(value, str) else text


def read_value(text: str) -> Any:
    """The value of a YAML text, as the trainer reads it."""
    return yaml.load(text, Loader=_Values)


def is_text(text: str) -> bool:
    """Whether it is read as this text where it stands without quotes."""
    return read_value(text) == text


def _expanded(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Number of values below a node, with those behind an alias counted at each use. known: {id: number; None while it is counted}."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in known:
        return known[id(node)] or 1  # an alias of itself is refused by name later
    known[id(node)] = None
    parts = [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]
    known[id(node)] = number = 1 + sum(_expanded(part, known) for part in parts)
    return number


def _refuse_twice(where: str, node: yaml.Node, done: set[int]) -> None:
    """PyYAML takes the last of two equal keys: an arm would disappear. done: nodes that were visited; an alias may repeat one."""
    if id(node) in done:
        return
    done.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise LaunchError(f"{where}: {key}: given twice in the mapping of line {line}; remove one of them")
    for child in node.value if isinstance(node.value, list) else ():
        for part in child if isinstance(child, tuple) else (child,):
            _refuse_twice(where, part, done)
