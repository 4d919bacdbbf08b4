"""The result of a benchmark: rows of numbers, as a table for the terminal and as JSON, and notes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

SPREAD = {"median": "{median:.4g}", "min": "{min:.4g}", "max": "{max:.4g}", "unit": "{unit}"}
WORDS = frozenset({"unit", "what it did"})  # columns of text are left-aligned


def stats(values: Sequence[float], unit: str) -> dict[str, Any]:
    """{median, min, max, unit} of at least one value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "unit": unit}


@dataclass(frozen=True)
class BenchResult:
    """title: what was measured, on which hardware.
    rows: {row: {median, min, max, unit, more numbers}}.
    columns: of the table, {heading: format of a row's fields}; "-" for a missing field.
    notes: lines below the table.
    beside: rows of other kinds, in JSON only (a note shows them).
    """

    title: str
    rows: dict[str, dict[str, Any]]
    columns: Mapping[str, str] = field(default_factory=lambda: SPREAD)
    notes: Sequence[str] = ()
    beside: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def table(self) -> Table:
        table = Table()
        table.add_column("row")
        for head in self.columns:
            table.add_column(head, justify="left" if head in WORDS else "right")
        for name, row in self.rows.items():
            table.add_row(name, *[_cell(text, row) for text in self.columns.values()])
        return table

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return self.rows | dict(self.beside)


def _cell(text: str, row: dict[str, Any]) -> str:
    try:
        return text.format_map(row)
    except (KeyError, IndexError, TypeError):  # no such field, an empty list, None
        return "-"
