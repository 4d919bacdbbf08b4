"""Every `trilevel` and `python -m launch` command in README, docs and the heads of the recipes is understood."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.arguments import parse as parse_launch
from launch.job import LaunchError
from tests.conftest import ROOT
from trainer.cli.arguments import parse as parse_trilevel

DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.yaml")])
PROGRAMS: dict[tuple[str, ...], Callable[[list[str]], object]] = {
    ("trilevel",): parse_trilevel,
    ("python", "-m", "launch"): parse_launch,
}


def whole_commands(text: str) -> list[str]:
    """Lines of code blocks, first cells of tables, `# Command:` of a recipe."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"^ {4}(\S.*)$", text, re.M)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    cells = [cell for cell in re.findall(r"^\| `([^`]+)` \|", text, re.M) if "\\|" not in cell]
    return [*lines, *cells, *re.findall(r"^# Command: +(.+?)(?: {2,}.*)?$", text, re.M)]


def words_of(command: str) -> list[str]:
    """`[--out DIR]` is dropped, a count that is a letter (`--step S`) becomes 1, what follows `;` and `#` is left out."""
    plain = re.sub(r"\[[^\]=]*(?:=[^\]]*)?\](?!')", "", command) if "[--" in command or "[key" in command else command
    return shlex.split(re.sub(r"(--[\w-]+) [A-Z]\b", r"\1 1", plain).partition(";")[0], comments=True)


def found(text: str) -> list[tuple[Callable[[list[str]], object], list[str]]]:
    commands = []
    for line in whole_commands(text):
        for program, parse in PROGRAMS.items():
            if line.startswith(" ".join(program) + " "):
                commands.append((parse, words_of(line)[len(program) :]))
    return commands


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_whole_command_is_understood(document: Path) -> None:
    for parse, words in found(document.read_text()):
        try:
            parse(words)
        except (SystemExit, LaunchError) as error:
            pytest.fail(f"{' '.join(words)}: {error}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_is_mentioned_exists(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in set(re.findall(r"`trilevel ([a-z]+)", document.read_text())):
        with pytest.raises(SystemExit) as left:
            parse_trilevel([name, "--help"])
        assert left.value.code == 0, name


def test_commands_are_found_and_a_wrong_one_is_refused() -> None:
    assert sum(len(found(document.read_text())) for document in DOCUMENTS) > 60
    for text in ("```\n$ trilevel train CONFIG --chek\n```", "| `python -m launch hosts CONFIG` | no hostfile |"):
        ((parse, words),) = found(text)
        with pytest.raises((SystemExit, LaunchError)):
            parse(words)
