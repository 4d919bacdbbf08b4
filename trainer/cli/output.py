"""Shared by the commands: load the configuration, print tables and lines, write results as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trainer.config.run_config import Config
from trainer.storage.text import printable


def configuration(a: argparse.Namespace) -> Config:
    from trainer.config.load import load

    return load(a.config, a.overrides, resume=getattr(a, "resume", False))


def show(text: object) -> None:
    """A line, or several; escape sequences from a foreign file don't reach the terminal."""
    print(printable(str(text)))


def show_table(table: Any) -> None:
    """A rich Table whose texts are shown as they are: names from data may look like markup or hold escape sequences."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    for column in table.columns:
        column._cells = [printable(cell) if isinstance(cell, str) else cell for cell in column._cells]
        column.header = printable(column.header) if isinstance(column.header, str) else column.header
    table.title = printable(table.title) if isinstance(table.title, str) else table.title
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def write_json(path: str | None, facts: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(facts, indent=1) + "\n")
