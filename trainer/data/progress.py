"""How far a long command is, on standard error: a bar on a terminal, else plain lines, so that a log shows work and not a hang."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer.storage.standard_streams import forgiving

EVERY = 10.0  # s between two plain lines
T = TypeVar("T")


class Lines:
    """Plain lines: one at the start, one every `EVERY` seconds with the time that is left at the mean pace, one at the end."""

    task_ids = (TaskID(0),)

    def __init__(
        self, title: str, total: int, unit: str, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._title, self._total, self._unit = title, total, unit
        self._file, self._clock = file, clock
        self._done = self._first = 0
        self._began = self._shown = clock()
        self._print("")

    def advance(self, task_id: TaskID = task_ids[0], advance: float = 1) -> None:
        """`advance` items more are done."""
        now = self._clock()
        if not self._done and now - self._began < 0.1:
            self._first = int(advance)  # were done before, e.g. by an interrupted command: no measure of the pace
        self._done += int(advance)
        if now - self._shown >= EVERY and self._done < self._total:
            self._shown, passed, paced = now, now - self._began, self._done - self._first
            left = f", about {_text(passed / paced * (self._total - self._done))} left" if paced else ""
            self._print(f", {_text(passed)} passed{left}")

    def end(self) -> None:
        """The last line."""
        self._print(f", {_text(self._clock() - self._began)} passed")

    def _print(self, times: str) -> None:
        print(
            f"{self._title}: {self._done} of {self._total} {self._unit}{times}",
            file=forgiving(self._file or sys.stderr),
            flush=True,
        )


@contextmanager
def progress_bar(title: str, total: int, unit: str, show: bool = True) -> Iterator[Progress | Lines]:
    """Progress over `total` items; call `progress.advance(progress.task_ids[0])` per item."""
    if show and not sys.stderr.isatty():
        lines = Lines(title, total, unit)
        yield lines
        lines.end()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        progress.add_task(title, total=total)
        yield progress


def tracked(items: Iterable[T], title: str, total: int, unit: str, show: bool = True) -> Iterator[T]:
    """The items, with progress over them."""
    with progress_bar(title, total, unit, show) as progress:
        for item in items:
            yield item
            progress.advance(progress.task_ids[0])


def _text(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
