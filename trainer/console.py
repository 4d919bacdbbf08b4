"""What a person sees while a run works: one live line on a terminal, plain lines elsewhere (one per log step at most)."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column


class Console:
    """Shows the facts of step, epoch and eval lines as the journal has them. On ranks other than 0: `show=False`, says nothing.

    `until`: the progress (in epochs) at which the run ends; `start`: the progress it goes on from.
    """

    def __init__(
        self,
        name: str,
        until: float,
        *,
        start: float = 0.0,
        show: bool = True,
        file: TextIO | None = None,
        terminal: bool | None = None,
    ):
        self._name, self._until, self._show = name, until, show
        self._facts: dict[str, Any] = {}
        self._clock = Clock()
        self._terminal = Terminal(file=file or sys.stdout, force_terminal=terminal, highlight=False)
        self._live: Progress | None = None
        self._task = TaskID(0)
        if show and self._terminal.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self._live = Progress(*columns, console=self._terminal, refresh_per_second=4, expand=False)
            self._task = self._live.add_task(name, total=until, said="starting")
            self._live.update(self._task, completed=start)
            self._live.start()

    def epoch(self, **facts: Any) -> None:
        """What the epoch shows: kept, examples."""
        self._facts |= facts

    def eval(self, **facts: Any) -> None:
        """The accuracy, shown with the next step: top1, ema."""
        self._facts["top1_ema" if facts.get("ema") else "top1"] = facts["top1"]

    def step(self, **facts: Any) -> None:
        """One log step: progress, loss, images_per_second, data_wait, keep_tokens, keep_connections; shown where given."""
        self._facts |= facts
        progress = float(self._facts.get("progress", 0.0))
        left = self._clock.left(progress, self._until)
        said = described(self._facts, self._until, left)
        if self._live:
            self._live.update(self._task, completed=min(progress, self._until), said=said)
        else:
            self._say(f"{self._name}  {said}")

    def message(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._live.console.print(text, markup=False, soft_wrap=True)
        else:
            self._say(text)

    def close(self) -> None:
        """Leave the last state of the live line on the terminal. May be called twice."""
        if self._live:
            self._live.stop()
            self._live = None
            self._show = False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, text: str) -> None:
        if self._show:
            print(text, file=self._terminal.file, flush=True)


class Clock:
    """Time left, from the pace of the last minutes: dropping makes epochs shorter, the mean of the whole run would mislead."""

    def __init__(self, half_life: float = 60.0):
        self._half_life = half_life
        self._last: tuple[float, float] | None = None  # (progress, seconds)
        self._pace: float | None = None  # seconds per epoch

    def left(self, progress: float, until: float, now: float | None = None) -> float | None:
        """Seconds until `until`, None before two calls."""
        now = time.monotonic() if now is None else now
        if self._last is not None and progress > self._last[0]:
            seconds = now - self._last[1]
            pace = seconds / (progress - self._last[0])
            fresh = 1 - 0.5 ** (seconds / self._half_life)
            self._pace = pace if self._pace is None else self._pace + fresh * (pace - self._pace)
        if self._last is None or progress != self._last[0]:
            self._last = (progress, now)
        return None if self._pace is None else max(0.0, until - progress) * self._pace


def described(facts: dict[str, Any], until: float, left: float | None) -> str:
    """The facts as one line of about 100 characters, the most wanted first."""
    parts = [f"epoch {facts.get('progress', 0.0):.1f}/{until:g}"]
    if left is not None:
        parts.append(f"{duration(left)} left")
    if "loss" in facts:
        parts.append(f"loss {facts['loss']:.3f}")
    if "top1" in facts:
        parts.append(f"top-1 {100 * facts['top1']:.1f} %")
    if "top1_ema" in facts:
        parts.append(f"(EMA {100 * facts['top1_ema']:.1f} %)")
    if "images_per_second" in facts:
        parts.append(f"{facts['images_per_second']:,.0f} images/s")
    if "data_wait" in facts:
        parts.append(f"wait {100 * facts['data_wait']:.0f} %")
    kept = []
    if facts.get("examples"):
        kept.append(f"examples {100 * facts['kept'] / facts['examples']:.0f}")
    kept += [f"{name} {100 * facts[f'keep_{name}']:.0f}" for name in ("tokens", "connections") if f"keep_{name}" in facts]
    if kept:
        parts.append("kept % " + " ".join(kept))
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """0:07, 12:40, 3:05:00, 2d 03:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
