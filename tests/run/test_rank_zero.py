"""Messages of a run reach its journal and the console."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from trainer.checkpoint.state import TrainState
from trainer.config.load import load
from trainer.run.rank_zero import RankZeroLog


def test_a_message_is_a_line_of_the_journal_and_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    written: list[Any] = []
    journal: Any = SimpleNamespace(write=lambda kind, **fields: written.append((kind, fields)))
    efficiency: Any = None  # only readings need it
    log = RankZeroLog(load(str(ROOT / "configs" / "quickstart.yaml"), []), journal, efficiency, TrainState())
    log.say("the checkpoint before is used")
    assert written == [("message", {"text": "the checkpoint before is used"})]
    assert "the checkpoint before is used" in capsys.readouterr().out
