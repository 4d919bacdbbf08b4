"""Arguments that several commands of `trilevel` have."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any, name: str, text: str, before: str = "") -> argparse.ArgumentParser:
    """A command. before: its name in earlier versions, which is still taken."""
    command = commands.add_parser(name, help=text, description=text, aliases=[before] if before else [])
    command.set_defaults(command=name)
    return command


def add_pipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--allow-pipe", action="store_true", help="allow `pipe:COMMAND` shards to run COMMAND in a shell")


def add_config(command: argparse.ArgumentParser, optional: bool = False) -> None:
    add_pipe(command)
    command.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help="YAML of the run")
    command.add_argument("overrides", metavar="key.sub=value", nargs="*", help="settings to change")
