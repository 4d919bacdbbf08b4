"""Messages of a run reach its journal and the console."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from trainer.checkpoint.state import TrainState
from trainer.config.load import load
from trainer.run import rank_zero
from trainer.run.rank_zero import RankZeroLog


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
