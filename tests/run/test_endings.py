"""The last lines of a run that ends early: cause, what is saved, what to type; the command that they print continues the run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_refusals import RECIPE
from trainer.__main__ import main
from trainer.config.errors import TrilevelError
from trainer.run.directory import how_to_continue


def test_what_is_saved_and_what_to_type(tmp_path: Path):
    run = tmp_path / "runs" / "x"
    (run / "checkpoints").mkdir(parents=True)
    assert how_to_continue(run, 1) == f"no checkpoint was saved; to continue: trilevel train {run}/config.yaml --resume"
    (run / "checkpoints" / "latest").write_text("step-00000241\n")
    saved = f"saved: {run}/checkpoints/step-00000241; to continue: "
    assert how_to_continue(run, 1, "2ep") == f"{saved}trilevel train {run}/config.yaml --resume stop_at=null"
    several = f"{saved}the same command with --resume, or python -m launch local {run}/config.yaml --resume"
    assert how_to_continue(run, 8) == several


def test_the_printed_command_continues_a_stopped_run_and_one_that_failed(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """`stopped at step 241` named no --resume, and the cause of a failure stood in line 85 of 174."""
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    assert main(["train", "job.yaml", "stop_at=2step", "control=0"]) == 0
    *_, ended, what = capsys.readouterr().out.splitlines()
    assert ended.startswith("job: stopped at step 2, epoch 0.0909")
    assert what.startswith(
        "  saved: runs/job/checkpoints/step-00000002; to continue: trilevel train runs/job/config.yaml --resume"
    )

    def killed(*args: Any, **more: Any) -> Any:
        raise RuntimeError("DataLoader worker (pid 24943) is killed by signal: Killed.")

    monkeypatch.setattr("trainer.train.draw_mix", killed)
    words = shlex.split(what.partition("trilevel ")[2])
    with pytest.raises(RuntimeError, match="is killed by signal") as error:
        main(words)
    assert error.value.__notes__ == [how_to_continue(Path("runs/job"), 1)], "printed below the traceback"


def test_a_user_error_of_a_run_is_printed_with_its_notes(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def refused(arguments: Any) -> None:
        error = TrilevelError("data.broken_share=0.001: 3 of 100 images are broken")
        error.add_note("saved: runs/x/checkpoints/step-8; to continue: ...")
        raise error

    monkeypatch.setitem(main.__globals__["COMMANDS"], "config", refused)
    assert main(["config"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "trilevel: data.broken_share=0.001: 3 of 100 images are broken",
        "  saved: runs/x/checkpoints/step-8; to continue: ...",
    ]
