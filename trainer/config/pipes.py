"""Whether `pipe:COMMAND` shards may run in a shell: only if the command line or its environment allows it.

A configuration file or run directory may come from another user: it can contain a command, but must not allow it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.config.errors import ConfigError

ALLOW_PIPE = "TRILEVEL_ALLOW_PIPE"
ALLOW_HINT = f"--allow-pipe on the command line, or {ALLOW_PIPE}=1 in its environment"


def pipes_allowed() -> bool:
    return os.environ.get(ALLOW_PIPE) == "1"


@contextmanager
def pipes_granted(grant: bool) -> Iterator[None]:
    """Allow commands inside the context, here and in child processes: loader workers, the fetch process."""
    if not grant or pipes_allowed():
        yield
        return
    before = os.environ.get(ALLOW_PIPE)
    os.environ[ALLOW_PIPE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOW_PIPE]
        else:
            os.environ[ALLOW_PIPE] = before


def refuse_grant_by_file(raw: dict[str, Any], path: str) -> None:
    """Raise ConfigError, with the commands that would run, if a file sets data.allow_pipe=true and the command line does not
    allow it. Files of earlier versions have the key."""
    data = raw.get("data")
    if not isinstance(data, dict) or (given := data.get("allow_pipe", False)) is False or pipes_allowed():
        return
    commands = [str(data[key]) for key in ("train", "validation") if str(data.get(key, "")).startswith("pipe:")]
    shown = "; ".join(repr(text.removeprefix("pipe:")) for text in dict.fromkeys(commands))
    raise ConfigError(
        f"config {path}: data.allow_pipe={given!r}: a file cannot allow shell commands; remove the line"
        + (f". This file would run {shown}; if you trust it, use {ALLOW_HINT}" if shown else f", or use {ALLOW_HINT}")
    )
