"""A run over batches without a finite loss: counted, named, replayed, resumed across, and stopped when there are too many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, lines, torchrun
from tests.laws.test_main_job import RECIPE
from trainer.config.schema import OptimConfig
from trainer.engine.errors import EngineError
from trainer.provenance.recorded_run import RecordedRun
from trainer.provenance.replay import replay
from trainer.run.nonfinite_steps import in_row, refuse_too_many


def test_steps_that_follow_one_another_are_counted() -> None:
    assert [in_row(steps) for steps in ([], [4], [4, 5], [1, 4, 5, 6], [4, 6])] == [0, 1, 2, 3, 1]


def test_too_many_are_refused_with_the_key_and_the_batch() -> None:
    settings, run = OptimConfig(max_skipped=3, max_skipped_in_row=2), Path("runs/x")
    refuse_too_many([1, 3, 4], settings, run)
    with pytest.raises(EngineError, match=r"3 steps in a row .*optim.max_skipped_in_row=2: steps 3, 4, 5\..*--step 5"):
        refuse_too_many([3, 4, 5], settings, run)
    with pytest.raises(EngineError, match=r"4 steps had .*optim.max_skipped=3"):
        refuse_too_many([1, 3, 5, 7], settings, run)


def job(folder: Path, world: int, spoiled: str, *words: str, code: int = 0, **variables: str) -> str:
    command = [
        sys.executable,
        *torchrun(world),
        str(ROOT / "tests" / "support" / "jobs" / "nan_losses.py"),
        spoiled,
        "train",
        str(folder / "job.yaml"),
    ]
    done = subprocess.run(
        [*command, *words], cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


WORDS = ["log_every=4step", "checkpoint.every=5step", "examples.method=infobatch", "control=0"]


@pytest.fixture(scope="module")
def spoiled(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps on two processes, the third and the fifth spoiled on the second one."""
    folder = tmp_path_factory.mktemp("spoiled")
    (folder / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    job(folder, 2, "3,5", *WORDS, "stop_at=9step")
    return folder / "runs" / "job"


@pytest.mark.dist
def test_a_run_skips_batches_without_a_finite_loss_and_names_them(spoiled: Path) -> None:
    skipped = lines(spoiled, "skipped")
    assert [(line["step"], line["epoch"], line["batch"], line["skipped"], line["in_row"]) for line in skipped] == [
        (3, 0, 2, 1, 1),
        (5, 0, 4, 2, 1),
    ]
    steps = {line["step"]: line for line in lines(spoiled, "step")}
    assert list(steps) == [3, 4, 5, 8, 9], "a skipped step is reported at once"
    assert all(line["loss"] < 10 for line in steps.values()), "of the losses that are numbers"
    past = RecordedRun(spoiled)
    replayed = replay(past, 5)
    assert replayed.confirmed and replayed.facts["skipped"] == skipped[1]["digest"] and "was skipped" in replayed.text()
    assert replay(past, 4).facts["skipped"] is None
    journal = spoiled / "journal.jsonl"
    written = journal.read_text()
    journal.write_text(written.replace('"digest":', '"seen":'))  # as earlier versions wrote it
    try:
        assert RecordedRun(spoiled).skipped == past.skipped and len(past.skipped) == 2
    finally:
        journal.write_text(written)


@pytest.mark.dist
@pytest.mark.slow
def test_too_many_stop_the_run_and_a_resume_counts_on(spoiled: Path) -> None:
    """More than `optim.max_skipped`, counted over both attempts."""
    message = job(spoiled.parent.parent, 1, "10", *WORDS, "--resume", "stop_at=30step", "optim.max_skipped=2", code=2)
    assert "3 steps had a non-finite loss or gradient, more than optim.max_skipped=2: steps 3, 5, 10." in message
    assert lines(spoiled, "end")[-1]["status"] == "failed" and lines(spoiled, "skipped")[-1]["in_row"] == 1


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_resumed_across_a_skipped_step_is_the_uninterrupted_one(spoiled: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text((spoiled.parent.parent / "job.yaml").read_text())
    job(tmp_path, 2, "3,5", *WORDS, "stop_at=5step")
    job(tmp_path, 2, "3,5", *WORDS, "stop_at=9step", "--resume")
    reported = [{line["step"]: (line["loss"], line["chain"]) for line in lines(run, "step") if line["step"] <= 9}
            for run in (spoiled, tmp_path / "runs" / "job")]  # fmt: skip
    assert reported[0] == reported[1]
    ends = [json.loads((run / "checkpoints/step-00000009/state.json").read_text())["state"]["skipped"]
            for run in (spoiled, tmp_path / "runs" / "job")]  # fmt: skip
    assert ends == [[3, 5], [3, 5]]


@pytest.mark.dist
@pytest.mark.slow
def test_known_two_steps_later_the_journal_names_the_same_steps_and_batches(spoiled: Path, tmp_path: Path) -> None:
    """As on a GPU: the fused optimizer leaves the step out, and the host learns of it two steps later, at the latest at a log line."""
    (tmp_path / "job.yaml").write_text((spoiled.parent.parent / "job.yaml").read_text())
    job(tmp_path, 2, "3,5,9", *WORDS, "stop_at=9step", "engine.kind=ddp", "optim.fused=true", LATE="1")
    run = tmp_path / "runs" / "job"
    now, late = (
        [
            {k: line[k] for k in ("step", "epoch", "batch", "digest", "skipped", "in_row")}
            for line in lines(where, "skipped")
            if line["step"] <= 9
        ]
        for where in (spoiled, run)
    )  # fmt: skip; another test resumes `spoiled`
    assert late[:2] == now and [line["step"] for line in late] == [3, 5, 9]
    assert [line["step"] for line in lines(run, "step")] == [4, 5, 8, 9], "at the next log line or checkpoint, which come first"
    state = json.loads((run / "checkpoints/step-00000009/state.json").read_text())["state"]
    assert state["skipped"] == [3, 5, 9]
    assert replay(RecordedRun(run), 5).confirmed
