"""Reads the YAML files that the launcher needs: configurations (name and folder of their runs) and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from launch.job import LaunchError, near


def read(kind: str, file: str, example: str) -> Any:
    """The content of a YAML file. kind: "config" or "study"; example: a path that would be valid. Raises LaunchError."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
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
