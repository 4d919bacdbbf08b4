"""The console: a live line on a terminal, plain lines elsewhere, a time left that follows the pace."""

from __future__ import annotations

import io
import re

import pytest

from tests.support.journals import lines
from trainer.analysis.units import duration
from trainer.run.console import Console


def reported(console: Console) -> int:
    """Write a whole run to the console; returns the number of log steps."""
    steps = 0
    for line in lines():
        if line["kind"] in ("epoch", "eval", "step"):
            getattr(console, line["kind"])(**line)
            steps += line["kind"] == "step"
    return steps


def test_plain_lines_one_per_log_step():
    out = io.StringIO()
    with Console("tri", 4, file=out) as console:
        console.message("packed")
        steps = reported(console)
    output = out.getvalue().splitlines()
    assert len(output) == steps + 1 and output[0] == "packed"
    assert "\x1b" not in out.getvalue()
    assert output[1].startswith(
        "tri  epoch 0.2/4  loss 1.917  100 images/s  wait 10 %  kept % examples 100 tokens 100 connections 100"
    )
    assert "epoch 4.0/4  0:00 left" in output[-1] and "top-1 78.8 %  (EMA 79.8 %)" in output[-1]
    assert "kept % examples 50 tokens 50 connections 50" in output[-1]


def test_the_closing_line_has_the_last_accuracy_and_the_position_at_the_end():
    out = io.StringIO()
    with Console("tri", 4, file=out) as console:
        reported(console)
        console.end("stopped", 32, 4.25)
    assert out.getvalue().splitlines()[-1] == "tri: stopped at step 32, epoch 4.25  top-1 84.4 %  (EMA 85.4 %)"


def test_live_line_on_a_terminal_stays_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console("tri", 4, file=out, terminal=True)
    reported(console)
    console.message("checkpoint [step 30] written")
    console.close()
    console.close()
    assert "\x1b[" in out.getvalue() and "loss" in out.getvalue() and "checkpoint [step 30] written" in out.getvalue()
    drawn = out.getvalue().replace("\x1b", "\n").replace("\r", "\n").split("\n")
    assert max(map(len, drawn)) < 75  # cut at the width, not wrapped
    assert out.getvalue().count("\n") == 2  # the message and the line that stays


@pytest.mark.parametrize(
    ("columns", "seen"),
    [(76, "kept 50/50/50 %"), (80, "tri epoch"), (110, "top-1 78.8 %"), (160, "kept % examples 50 tokens 50")],
)
def test_the_live_line_has_the_wanted_facts_at_any_width(monkeypatch: pytest.MonkeyPatch, columns: int, seen: str):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    with Console("tri", 4, file=out, terminal=True) as console:
        reported(console)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).rstrip().splitlines()[-1]
    assert all(fact in last for fact in ("epoch 4.0/4", "left", "loss 0.460", "100 im", "wait 10 %", seen)), last


def test_facts_that_are_missing_are_not_shown():
    out = io.StringIO()
    Console("tri", 4, file=out).step(progress=1.0, loss=float("nan"))
    assert out.getvalue() == "tri  epoch 1.0/4  loss nan\n"


def test_time_left_follows_the_pace_of_the_last_minutes():
    out, now = io.StringIO(), 0.0
    with Console("tri", 100, file=out, get_time=lambda: now) as console:
        for epoch in range(1, 31):
            now += 100 if epoch <= 10 else 30  # epochs became shorter
            console.step(progress=float(epoch))
        console.step(progress=101.0)
    shown = out.getvalue().splitlines()
    assert "left" not in shown[0] and "2:30:00 left" in shown[9] and "35:00 left" in shown[29] and "0:00 left" in shown[30]


def test_duration():
    assert [duration(s) for s in (0.4, 59.6, 3600, 86400 * 2 + 3 * 3600)] == ["0:00", "1:00", "1:00:00", "2d 03:00"]
