"""YAML of configurations: a key given twice is an error, and plain words are read by the rules of YAML 1.2.

PyYAML follows YAML 1.1, where `1:30` is 90, `017` is 15, `yes` is true, `1e-3` is text and `2024-01-01` is a date.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_MOST_VALUES = 100_000  # ten aliases of ten aliases ...: nine such lines would be 10^9 values


class _Loader(yaml.SafeLoader):
    """Safe tags only, with the scalars of YAML 1.2 (core schema) and merge keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`; a key beside it overrides, which is no repetition
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, str | int | float | bool):
                if key in keys:
                    raise yaml.YAMLError(
                        f"line {line}: the key {key!r} is given twice, first in line {keys[key]}; remove one of them"
                    )
                keys[key] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _integer(loader: _Loader, node: Any) -> int:
    return int(loader.construct_scalar(node))  # PyYAML reads 017 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, ValueError or RecursionError where it is none."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # before anything is made of it: a merge (`<<: *name`) copies what its alias holds
        if (number := _expanded(node, {})) > _MOST_VALUES:
            raise yaml.YAMLError(f"{number:,} values once its aliases (*name) are expanded, must be <= {_MOST_VALUES:,}")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded(node: Any, known: dict[int, int | None]) -> int:
    """Number of values below a node, with those behind an alias counted at each use. known: {id: number; None while it is counted}."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in known:
        if (number := known[id(node)]) is None:
            raise yaml.YAMLError("an anchor (&name) contains an alias (*name) of itself; write the values out")
        return number
    known[id(node)] = None
    parts = [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]
    known[id(node)] = number = 1 + sum(_expanded(part, known) for part in parts)
    return number
