"""The progress bar of long commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, total: int, unit: str, show: bool = True) -> Iterator[Progress]:
    """A progress bar over `total` items; call `progress.advance(progress.task_ids[0])` per item."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as progress:
        progress.add_task(title, total=total)
        yield progress
