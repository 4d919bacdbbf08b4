"""A run over batches that can't be learned from: told, named, replayed, resumed across, and stopped when there are too many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, lines, torchrun
from tests.test_main_job import RECIPE
from trainer.engine_state import EngineError
from trainer.past import Past
from trainer.replay import replay
from trainer.sections import Optim
from trainer.skips import in_row, refuse_too_many


def test_steps_that_follow_one_another_are_counted() -> None:
    assert [in_row(steps) for steps in ([], [4], [4, 5], [1, 4, 5, 6], [4, 6])] == [0, 1, 2, 3, 1]


def test_too_many_are_refused_with_the_key_and_the_batch() -> None:
    settings, run = Optim(max_skipped=3, max_skipped_in_row=2), Path("runs/x")
    refuse_too_many([1, 3, 4], settings, run)
    with pytest.raises(EngineError, match=r"3 steps in a row .*optim.max_skipped_in_row=2: steps 3, 4, 5\..*--step 5"):
        refuse_too_many([3, 4, 5], settings, run)
    with pytest.raises(EngineError, match=r"4 steps had .*optim.max_skipped=3"):
        refuse_too_many([1, 3, 5, 7], settings, run)


def job(folder: Path, world: int, spoiled: str, *words: str, code: int = 0) -> str:
    command = [
        sys.executable,
        *torchrun(world),
        str(ROOT / "tests" / "skips_job.py"),
        spoiled,
        "train",
        str(folder / "job.yaml"),
    ]
    done = subprocess.run([*command, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.dist
def test_a_run_goes_on_over_spoiled_batches_names_them_and_stops_when_there_are_too_many(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    words = ["log_every=4step", "checkpoint.every=5step", "examples.method=infobatch", "control=0"]
    job(tmp_path, 2, "3,5", *words, "name=whole", "stop_at=9step")
    run = tmp_path / "runs" / "whole"
    skipped = lines(run, "skipped")
    assert [(line["step"], line["epoch"], line["batch"], line["skipped"], line["in_row"]) for line in skipped] == [
        (3, 0, 2, 1, 1),
        (5, 0, 4, 2, 1),
    ]
    steps = {line["step"]: line for line in lines(run, "step")}
    assert list(steps) == [3, 4, 5, 8, 9], "what is skipped is told at once"
    assert all(line["loss"] == line["loss"] and line["loss"] < 10 for line in steps.values()), "the losses that are numbers"
    past = Past(run)
    seen = replay(past, 5)
    assert seen.confirmed and seen.facts["skipped"] == skipped[1]["seen"] and "not taken" in seen.text()
    assert replay(past, 4).facts["skipped"] is None

    job(tmp_path, 2, "3,5", *words, "name=again", "stop_at=5step")
    job(tmp_path, 2, "3,5", *words, "name=again", "stop_at=9step", "--resume")
    other = tmp_path / "runs" / "again"
    assert {line["step"]: (line["loss"], line["chain"]) for line in lines(other, "step")} == {
        step: (line["loss"], line["chain"]) for step, line in steps.items()
    }
    ends = [json.loads((r / "checkpoints/step-00000009/state.json").read_text())["state"]["skipped"] for r in (run, other)]
    assert ends == [[3, 5], [3, 5]]

    said = job(
        tmp_path, 1, "10,11,12", *words, "name=again", "--resume", "stop_at=30step", "optim.max_skipped_in_row=2", code=2
    )
    assert "3 steps in a row had a loss or a gradient that is not finite, more than optim.max_skipped_in_row=2" in said
    assert lines(other, "end")[-1]["status"] == "failed" and lines(other, "skipped")[-1]["in_row"] == 3
