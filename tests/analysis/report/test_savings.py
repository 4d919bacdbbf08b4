"""What a run saved, from a journal of a few lines; a clock that is set back for one line adds no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.journals import lines, write
from trainer.analysis.comparison.groups import dense as is_dense
from trainer.analysis.history import history
from trainer.analysis.report.savings import savings


def test_examples_left_out_count_as_steps_that_a_dense_run_would_have_made() -> None:
    plan = {"keep_tokens": 0.5, "keep_connections": 1.0}
    found = savings(
        [
            {"kind": "start", "multiply_adds": 100.0},
            {"kind": "epoch", "kept": 50, "examples": 100},
            {"kind": "plateau", "multiply_adds": 40.0, **plan},
            {"kind": "control", "step_speedup": 1.5, **plan},
            {"kind": "step", "seconds": 10.0, "images": 50, **plan},
        ]
    )
    assert found.speedup == pytest.approx(1.5 / 0.5) and found.bound == pytest.approx(1 / 0.4 / 0.5)
    assert (found.kept, found.timed) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("dense", "share"), [([256, 64, 16, 16, 16, 4], 1.0), ([256, 64, 16, 32, 32, 4], 372 / 404), (None, 0.2422)]
)
def test_kept_tokens_are_a_share_of_those_of_the_dense_network(tmp_path: Path, dense: list[int] | None, share: float) -> None:
    """Later stages of a Swin have fewer tokens though nothing is left out. Journals of earlier versions, of ViTs, do not list them."""
    journal = list(lines(sparse=False))
    for line in journal:
        if line["kind"] == "start" and dense is not None:
            line["tokens"] = dense
        if line["kind"] == "plateau":
            line["tokens"] = [256, 64, 16, 16, 16, 4]
    run = history(write(tmp_path / "run", journal))
    assert run.mean_share("tokens") == pytest.approx(share, rel=1e-3)
    assert is_dense(run) == (share == 1.0)


def test_a_line_with_an_earlier_time_adds_none(tmp_path: Path) -> None:
    journal = list(lines())
    plain = history(write(tmp_path / "plain", journal)).last
    journal[8] |= {"time": journal[8]["time"] - 1000.0}
    back = history(write(tmp_path / "back", journal)).last
    assert (back.elapsed, back.device_seconds) == (pytest.approx(plain.elapsed), pytest.approx(plain.device_seconds))
