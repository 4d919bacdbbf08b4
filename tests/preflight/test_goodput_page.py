"""The page of simulated goodput: its inputs are those of the kept faults, its target is judged from its own numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.preflight import goodput_page


def kept(folder: Path, *faults: tuple[float | None, float | None]) -> Path:
    rows = [{"to_exit": end, "to_step": step} for end, step in faults]
    about = {"hardware": "2 cores", "date": "2026-01-01", "commit": "c0ffee"}
    lines = [
        {"kind": "rank 0 killed", "faults": rows, **about},
        {"kind": "other", "faults": [{"to_exit": 1.0, "to_step": 2.0}]},
    ]
    (folder / "faults.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder / "faults.jsonl"


def test_inputs_are_medians_of_the_kept_faults(tmp_path: Path) -> None:
    found = goodput_page.measured(kept(tmp_path, (10.0, 50.0), (20.0, 90.0), (None, 5.0), (15.0, 60.0)))
    assert found == (3, 15.0, 35.0, "2 cores, 2026-01-01, c0ffee")


@pytest.mark.parametrize(("start", "word"), [(60.0, "above"), (900.0, "below")])
def test_the_page_judges_the_target(tmp_path: Path, start: float, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput_page, "ASSUMED", ())
    text = "\n".join(goodput_page.page(kept(tmp_path, (20.0, 30.0 + start)), hours=6))
    assert f"{word} the target of 95%" in text and "simulated" in text.splitlines()[0]
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith(("| 3 h | ", "| 10 min | ")) and "**" in row]
    assert len(rows) == 2
    for row in rows:
        assert (float(re.sub(r"[*%]", "", row[4])) >= 95) == (row[10] == "yes")
    assert rows[0][1] == f"{start:.0f} (measured)" and (rows[0][10] == "yes") == (word == "above")
