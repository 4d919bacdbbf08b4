"""The small form of `bench journal`: every state is met, every number is there. What they are is measured by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trainer.bench.journal import bench


@pytest.mark.dist
def test_the_small_form_measures_every_state_without_a_server():
    result = bench(lines=12, pause=0.0, states=("alone", "stopped", "silent"))
    rows = result.rows
    for state, row in rows.items():
        assert 0 < row["min"] <= row["median"] <= row["p99"] <= row["max"] and row["unit"] == "ms" and row["share"] > 0
        assert len(row["memory_mib"]) == 2 and len(row["shipper_mib"]) == (0 if state == "alone" else 2) and row["sent"] == 0
    out = io.StringIO()
    Console(file=out, width=120).print(result.table())
    assert all(state in out.getvalue() for state in rows)
