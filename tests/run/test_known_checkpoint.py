"""A node remembers the newest checkpoint, so that ranks which torchrun starts again do not begin a vanished run anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checkpoint.save_load import CheckpointError
from trainer.run import known_checkpoint
from trainer.storage.exit_code import forget_exit_code, write_exit_code


@pytest.fixture
def exit_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRILEVEL_EXIT_FILE", str(tmp_path / "exit"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "exit"


def test_a_run_that_had_a_checkpoint_is_not_begun_anew(exit_file: Path) -> None:
    folder = Path("runs/x/checkpoints")
    known_checkpoint.refuse_to_begin_anew(folder)  # its first attempt
    known_checkpoint.note(folder / "step-00000008")
    with pytest.raises(CheckpointError, match=r"runs/x/checkpoints: no checkpoint, but .*step-00000008 was there.*not mounted"):
        known_checkpoint.refuse_to_begin_anew(folder)


def test_without_a_launcher_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRILEVEL_EXIT_FILE", raising=False)
    known_checkpoint.note(tmp_path / "step-00000008")
    known_checkpoint.refuse_to_begin_anew(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_exit_code_of_an_attempt_before_is_forgotten_once_per_node(
    exit_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's agent starts failed ranks again: a finished job must not end with the 76 of its first attempt."""
    write_exit_code(76)
    monkeypatch.setenv("LOCAL_RANK", "1")
    forget_exit_code()
    assert exit_file.read_text() == "76"
    monkeypatch.setenv("LOCAL_RANK", "0")
    forget_exit_code()
    forget_exit_code()
    assert not exit_file.exists()
