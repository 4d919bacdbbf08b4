"""Shared by the commands: load the configuration, print tables and lines, write results as JSON, refuse paths of results."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.journal.file import plain
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
    """Numbers that are not finite as in the journal: the strings "NaN", "Infinity", "-Infinity". Raises ConfigError where it cannot be
    written."""
    if path:
        try:
            Path(path).write_text(json.dumps(plain(facts), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise _cannot_write(f"--json {path}", path, error) from error


def refuse_outputs(a: argparse.Namespace) -> None:
    """Before the work of a command: raises ConfigError, naming the option and its path, where a result could not be written."""
    if os.environ.get("RANK", "0") != "0":  # rank 0 writes
        return
    if file := getattr(a, "json", None):
        _refuse_file(f"--json {file}", Path(file), Path(file).absolute().parent)
    if folder := getattr(a, "plots", None):
        _refuse_folder(f"--plots {folder}", _first_there(Path(folder)))
    if a.command == "export":
        _refuse_file(f"export {a.out}", Path(a.out), _first_there(Path(a.out).absolute().parent))


def _first_there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists, in which it would be made."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(one))


def _refuse_file(what: str, file: Path, folder: Path) -> None:
    if file.is_dir():
        raise ConfigError(f"{what}: is a folder; name a file in it")
    if not os.path.exists(file):
        _refuse_folder(what, folder)
    elif not os.access(file, os.W_OK):
        raise ConfigError(f"{what}: cannot be written; name another path, or change its permissions")


def _refuse_folder(what: str, folder: Path) -> None:
    """By a file that is made there and removed: whether a folder takes files, its permissions alone don't tell."""
    if not folder.exists():
        raise ConfigError(f"{what}: no such folder: {folder}; make it first, or name another path")
    if not folder.is_dir():
        raise ConfigError(f"{what}: {folder} is a file, not a folder; name another path")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _cannot_write(what, folder, error) from error


def _cannot_write(what: str, place: object, error: OSError) -> ConfigError:
    return ConfigError(f"{what}: cannot write to {place} ({error.strerror}); name another path")
