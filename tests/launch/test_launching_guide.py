"""docs/launching.md: every command in it is understood, and what can be rendered is."""

from __future__ import annotations

import shlex
import shutil

import pytest

import launch.__main__ as program
from tests.conftest import ROOT
from trainer.cli.arguments import parse

TEXT = (ROOT / "docs" / "launching.md").read_text()
BLOCKS = [block.partition("\n")[2] for block in TEXT.split("```")[1::2]]
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.strip()]
OURS = [[word for word in words if "=" not in word or "." in word or word.startswith("name")] for words in COMMANDS]
LAUNCHES = [words[3:] for words in OURS if words[:3] == ["python", "-m", "launch"]]
TRILEVELS = [words[1:] for words in OURS if words[0] == "trilevel"]


@pytest.mark.parametrize("words", LAUNCHES, ids=" ".join)
def test_every_launch_can_be_rendered(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("CONFIG", "configs/a.yaml", "configs/b.yaml"):
        (tmp_path / name).write_text(f"name: {name[-6]}\n")
    (tmp_path / "hosts").write_text("".join(f"node{number} slots=8\n" for number in range(4)))
    monkeypatch.setattr(program, "start", lambda command: pytest.fail("started"))
    assert program.main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    if "--keep" in words:  # starts nothing: a table of the runs
        assert "levels-dense-seed0" in out
    else:
        assert "trainer train" in out and "--check" in out


@pytest.mark.parametrize("words", TRILEVELS, ids=" ".join)
def test_every_other_command_is_known(words):
    assert parse(words).command


def test_the_guide_names_all_commands_and_flags():
    assert {words[0] for words in LAUNCHES} == {"local", "hosts", "slurm", "sweep", "study"} and len(TRILEVELS) >= 5
    for flag in (
        "--signal",
        "--no-requeue",
        "--module",
        "--setup",
        "--sbatch",
        "--container",
        "--runtime",
        "--python",
        "--ssh-config",
        "--logs",
    ):
        assert flag in TEXT
