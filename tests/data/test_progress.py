"""A long command shows how far it is: lines where there is no terminal, none of them on standard output."""

from __future__ import annotations

import io

import pytest

from trainer.data.progress import EVERY, Lines, progress_bar, tracked
from trainer.telemetry.timing import interleave


def test_lines_have_count_time_passed_and_time_left():
    """One item a second; the two that an interrupted command left are no measure of the pace."""
    file, now = io.StringIO(), [0.0]
    lines = Lines("pack train", 62, "shards", file, clock=lambda: now[0])
    assert file.getvalue() == "pack train: 0 of 62 shards\n", "at once, before the first item"
    lines.advance(lines.task_ids[0], 2)
    for _ in range(60):
        now[0] += 1
        lines.advance(lines.task_ids[0])
    lines.end()
    shown = file.getvalue().splitlines()[1:]
    assert shown[0] == "pack train: 12 of 62 shards, 0:00:10 passed, about 0:00:50 left"
    assert shown[-2:] == [
        "pack train: 52 of 62 shards, 0:00:50 passed, about 0:00:10 left",
        "pack train: 62 of 62 shards, 0:01:00 passed",
    ]
    assert len(shown) == 60 / EVERY


def test_items_pass_through_and_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]):
    assert list(tracked("abc", "eval", 3, "batches")) == ["a", "b", "c"]
    with progress_bar("index", 4, "shards") as progress:
        progress.advance(progress.task_ids[0], 3)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "eval: 0 of 3 batches",
        "eval: 3 of 3 batches, 0:00:00 passed",
        "index: 0 of 4 shards",
        "index: 3 of 4 shards, 0:00:00 passed",
    ]
    with progress_bar("index", 4, "shards", show=False) as progress:
        progress.advance(progress.task_ids[0], 3)
    assert capsys.readouterr() == ("", "")


def test_timed_rows_show_their_passes(capsys: pytest.CaptureFixture[str]):
    """`bench step` and `parity` wrote nothing for 420 s into a file."""
    assert interleave({"a": lambda: 1, "b": lambda: 2}, 3, show="bench step") == {"a": [1] * 3, "b": [2] * 3}
    assert capsys.readouterr().err.splitlines()[0] == "bench step: 0 of 6 passes"
    interleave({"a": lambda: 1}, 3)
    assert capsys.readouterr().err == ""


def test_a_closed_standard_error_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    gone = io.StringIO()
    gone.close()
    lines = Lines("eval", 2, "batches", gone)
    lines.advance()
    lines.end()
