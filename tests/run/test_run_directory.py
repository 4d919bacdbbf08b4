"""The run directory of a run that starts: whose it is, decided by the lock of its journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.errors import ConfigError
from trainer.journal.file import JournalError
from trainer.journal.writer import Journal
from trainer.run import directory as module
from trainer.run.directory import create_run_directory, refuse_renamed


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_runs_that_start_at_once_the_second_changes_no_file(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config.yaml of the run was once that of the refused one."""
    monkeypatch.setattr(module, "source", lambda: "commit a\n")
    with create_run_directory(tmp_path / "run", {"seed": 1}, resume=resume):
        monkeypatch.setattr(module, "source", lambda: "commit b\n")
        with pytest.raises(JournalError, match=r"another process is writing it; .*name=NEW_NAME"):
            create_run_directory(tmp_path / "run", {"seed": 2}, resume=resume)
        assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
        assert (tmp_path / "run" / "source.txt").read_text() == "commit a\n"


def test_a_run_that_wrote_and_ended_while_another_waited_for_the_lock_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_run_directory(tmp_path / "run", {"seed": 1}, resume=False).close()

    def late(directory: Path) -> Journal:
        with Journal(directory) as theirs:
            theirs.write("message", text="x")
        return Journal(directory)

    monkeypatch.setattr(module, "Journal", late)
    with pytest.raises(ConfigError, match=r"run exists: continue it with --resume"):
        create_run_directory(tmp_path / "run", {"seed": 2}, resume=False)
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
    Journal(tmp_path / "run").close()  # the refused run holds no lock


def test_a_start_that_failed_before_its_first_line_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"No space left on device; free disk space"):
        patch.setattr(module, "write_text", full)
        create_run_directory(tmp_path / "run", {"seed": 1}, resume=False)
    create_run_directory(tmp_path / "run", {"seed": 2}, resume=False).close()
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 2\n"


def test_the_configuration_of_a_renamed_run_directory_does_not_resume(tmp_path: Path) -> None:
    """It would begin the run anew, in the directory that its name stands for."""
    for name in ("run", "moved"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.jsonl").write_text("{}")
    refuse_renamed(tmp_path / "run" / "config.yaml", tmp_path / "run")
    refuse_renamed(tmp_path / "recipe.yaml", tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"Continue that run with runs={tmp_path} name=moved "):
        refuse_renamed(tmp_path / "moved" / "config.yaml", tmp_path / "run")
