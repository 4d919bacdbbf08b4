"""What a person sees while a run works: one live line on a terminal, plain lines elsewhere (one per log step at most)."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from trainer.analysis.units import duration

WIDE = 120  # columns from which on there is room for a bar


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
        self._clock = EtaClock()
        self._terminal = Terminal(file=file or sys.stdout, force_terminal=terminal, highlight=False)
        self._live: Progress | None = None
        self._bar = False
        self._task = TaskID(0)
        if show and self._terminal.is_terminal:
            self._bar = self._terminal.width >= WIDE
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self._live = Progress(
                *(columns if self._bar else columns[::2]), console=self._terminal, refresh_per_second=4, expand=False
            )
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
            name, width = self._name, self._terminal.width
            if len(name) + len(said) + (18 if self._bar else 1) > width:
                said = described(self._facts, self._until, left, short=True)
                wanted = described(self._facts | {"top1": None, "top1_ema": None}, self._until, left, short=True)
                name = name if len(name) + len(wanted) < width else ""
                room = width - len(name) - 1
                said = said if len(said) <= room else f"{said[: room - 1]}…"
            self._live.update(self._task, completed=min(progress, self._until), said=said, description=name)
        else:
            self._say(f"{self._name}  {said}")

    def end(self, status: str, step: int) -> None:
        """How it ended, with the last accuracy: no step follows that would show it."""
        said = f"{self._name}: {status} at step {step:,}, epoch {self._facts.get('progress', 0.0):.1f}"
        self.message("  ".join([said, *_accuracy(self._facts)]))

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


class EtaClock:
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


def described(facts: dict[str, Any], until: float, left: float | None, short: bool = False) -> str:
    """The facts as one line of about 100 characters, the most wanted first; short: 80, what is kept of examples/tokens/connections."""
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
