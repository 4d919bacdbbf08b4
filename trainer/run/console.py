"""Progress of a run on standard output: one live line on a terminal, else plain lines (at most one per log step)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from trainer.analysis.units import duration
from trainer.storage.standard_streams import forgiving
from trainer.storage.text import printable

WIDE = 120  # columns; narrower terminals get no progress bar
PACE = 600.0  # seconds of progress that the time left is estimated from: with dropping, later epochs are faster than the run's mean


class Console:
    """Shows step, epoch and eval lines of the journal. Drops output that a closed or full terminal, pipe or log does not accept: no
    method raises OSError.

    name: of the run.
    until, start: progress (in epochs) at which the run ends, and at which this attempt starts.
    file: default standard output.
    terminal: whether `file` is a terminal; default: detect.
    get_time: clock in seconds, for tests.
    """

    def __init__(
        self,
        name: str,
        until: float,
        *,
        start: float = 0.0,
        file: TextIO | None = None,
        terminal: bool | None = None,
        get_time: Callable[[], float] | None = None,
    ):
        self._name, self._until = name, until
        self._facts: dict[str, Any] = {}
        self._terminal = Terminal(file=forgiving(file or sys.stdout), force_terminal=terminal, highlight=False)
        self._is_live = self._terminal.is_terminal
        self._has_bar = self._terminal.width >= WIDE
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        )
        self._progress = Progress(
            *(columns if self._has_bar else columns[::2]),
            console=self._terminal,
            refresh_per_second=4,
            speed_estimate_period=PACE,
            get_time=get_time,
            disable=not self._is_live,
        )
        self._task = self._progress.add_task(name, total=until, text="starting")
        self._progress.update(self._task, completed=start)
        self._progress.start()

    def epoch(self, **facts: Any) -> None:
        """Examples of the epoch: kept, examples."""
        self._facts |= facts

    def eval(self, **facts: Any) -> None:
        """Accuracy, shown with the next log step: top1, ema."""
        self._facts["top1_ema" if facts.get("ema") else "top1"] = facts["top1"]

    def step(self, **facts: Any) -> None:
        """One log step: progress, loss, images_per_second, data_wait, keep_tokens, keep_connections; missing ones are left out."""
        self._facts |= facts
        progress = float(self._facts.get("progress", 0.0))
        self._progress.update(self._task, completed=min(progress, self._until))
        left = self._progress.tasks[0].time_remaining  # None before two steps
        text = described(self._facts, self._until, left)
        if self._is_live:
            name, width = self._name, self._terminal.width
            if len(name) + len(text) + (18 if self._has_bar else 1) > width:
                text = described(self._facts, self._until, left, short=True)
                without = described(self._facts | {"top1": None, "top1_ema": None}, self._until, left, short=True)
                name = name if len(name) + len(without) < width else ""
                columns = width - len(name) - 1
                text = text if len(text) <= columns else f"{text[: columns - 1]}…"
            self._progress.update(self._task, text=text, description=name)
        else:
            self._print(f"{self._name}  {text}")

    def end(self, status: str, step: int, progress: float) -> None:
        """The closing line: status, position at the end (the last log line has the position before its step), last accuracy."""
        self._progress.update(self._task, completed=min(progress, self._until))
        text = f"{self._name}: {status} at step {step:,}, epoch {progress:.4g}"
        self.message("  ".join([text, *_accuracy(self._facts)]))

    def message(self, text: str) -> None:
        """A line printed above the live line."""
        text = printable(text)
        if self._is_live:
            self._terminal.print(text, markup=False, soft_wrap=True)
        else:
            self._print(text)

    def close(self) -> None:
        """Stop updating the live line, which stays on the terminal. May be called twice."""
        with contextlib.suppress(OSError):  # rich asks the terminal itself
            self._progress.stop()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, text: str) -> None:
        print(text, file=self._terminal.file, flush=True)


def described(facts: dict[str, Any], until: float, left: float | None, short: bool = False) -> str:
    """The facts as one line of about 100 characters, the most important first; short: about 80."""
    parts = [f"epoch {facts.get('progress', 0.0):.1f}/{until:g}"]
    if left is not None:
        parts.append(f"{duration(left)} left")
    if "loss" in facts:
        parts.append(f"loss {facts['loss']:.3f}")
    if not short:
        parts += _accuracy(facts)
    if "images_per_second" in facts:
        parts.append(f"{facts['images_per_second']:,.0f} {'img/s' if short else 'images/s'}")
    if "data_wait" in facts:
        parts.append(f"wait {100 * facts['data_wait']:.0f} %")
    kept = {name: facts[f"keep_{name}"] for name in ("tokens", "connections") if f"keep_{name}" in facts}
    if facts.get("examples"):
        kept = {"examples": facts["kept"] / facts["examples"]} | kept
    if kept and short:
        parts.append(f"kept {'/'.join(f'{100 * share:.0f}' for share in kept.values())} %")
    elif kept:
        parts.append("kept % " + " ".join(f"{name} {100 * share:.0f}" for name, share in kept.items()))
    return "  ".join(parts + (_accuracy(facts) if short else []))


def _accuracy(facts: dict[str, Any]) -> list[str]:
    parts = [f"top-1 {100 * facts['top1']:.1f} %"] if facts.get("top1") is not None else []
    return parts + ([f"(EMA {100 * facts['top1_ema']:.1f} %)"] if facts.get("top1_ema") is not None else [])
