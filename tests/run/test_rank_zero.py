"""Messages of a run reach its journal and the console."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from trainer.analysis.report.goodput import before_attempt
from trainer.checkpoint.state import TrainState
from trainer.config.load import load
from trainer.journal.reader import read
from trainer.journal.writer import Journal
from trainer.run import rank_zero
from trainer.run.rank_zero import RankZeroLog
from trainer.telemetry.efficiency import Efficiency


def test_a_message_is_a_line_of_the_journal_and_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    written: list[Any] = []
    journal: Any = SimpleNamespace(write=lambda kind, **fields: written.append((kind, fields)))
    efficiency: Any = None  # only readings need it
    log = RankZeroLog(load(str(ROOT / "configs" / "quickstart.yaml"), []), journal, efficiency, TrainState())
    log.say("the checkpoint before is used")
    assert written == [("message", {"text": "the checkpoint before is used"})]
    assert "the checkpoint before is used" in capsys.readouterr().out


def test_the_first_lines_warn_and_name_where_a_resumed_run_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero.description, "start_line", lambda *parts: {"world": 2})
    monkeypatch.setattr(rank_zero.description, "write", lambda *parts: None)
    config = load(str(ROOT / "configs" / "quickstart.yaml"), ["tracking.to=journal"])
    engine: Any = SimpleNamespace(world=2)
    none: Any = None
    for attempt, state in ((0, TrainState()), (1, TrainState(epoch=3, batch=4, step=50))):
        written: list[Any] = []
        journal: Any = SimpleNamespace(attempt=attempt, write=lambda kind, w=written, **fields: w.append((kind, fields)))
        RankZeroLog(config, journal, none, state).start(state, engine, {}, none, {"warnings": ["data.workers=0 is slow"]})
        console = capsys.readouterr().out
        assert "warning: data.workers=0 is slow" in console
        assert written[0] == ("start", {"world": 2, "warnings": ["data.workers=0 is slow"]})
        assert written[1:] == ([("resume", {"epoch": 3, "batch": 4, "step": 50})] if attempt else [])
        assert ("quickstart: resumes at epoch 3, batch 4 (step 50)" in console) == bool(attempt)


def test_the_goodput_of_the_end_line_is_the_share_of_training_by_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt of 100 s failed 50 s ago, one that failed before its start line in between; this one lived 20 s."""
    monkeypatch.setattr(rank_zero.report, "write", lambda directory: None)
    config = load(str(ROOT / "configs" / "quickstart.yaml"), ["tracking.to=journal", f"runs={tmp_path}", "name=run"])
    run = tmp_path / "run"
    with Journal(run) as first:
        began = first.now() - 150
        for line in (
            ("start", 0.0, {"starting": 0.0}),
            ("step", 100.0, {"step": 5, "spent": {"start": 40.0, "training": 60.0}}),
        ):
            monkeypatch.setattr(first, "now", lambda at=began + line[1]: at)
            first.write(line[0], **line[2])
    with Journal(run) as second:
        monkeypatch.setattr(second, "now", lambda: began + 120)
        second.write("end", status="failed", starting=0.0, step=0)
    with Journal(run) as third:
        third.write("start", starting=20.0)
        third.write("resume", step=5)
        before = before_attempt(run, third.attempt, third.now(), 20.0, 5)
        efficiency = Efficiency(run, third.attempt, 1, 20.0, 1e12, before)
        spent = {"start": 15.0, "training": 5.0}
        going_on = efficiency.so_far(spent)["goodput"]
        RankZeroLog(config, third, efficiency, TrainState(step=5)).end(TrainState(step=7), "finished", "", spent)
    end = list(read(run))[-1]
    assert end["goodput"] == pytest.approx(end["by_cause"]["training"] / sum(end["by_cause"].values()))
    assert end["goodput"] == pytest.approx(65 / 150, abs=0.01) == going_on and end["paused"] == 0
    assert end["by_cause"]["restart"] == pytest.approx(30, abs=1)
