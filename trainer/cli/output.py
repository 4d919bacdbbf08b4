"""What the commands share: the configuration they are given, tables for the terminal, results as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trainer.config.run_config import Config


def configuration(a: argparse.Namespace) -> Config:
    from trainer.config.load import load

    return load(a.config, a.overrides)


def show_table(table: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False).print(table)


def write_json(path: str | None, facts: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(facts, indent=1) + "\n")
