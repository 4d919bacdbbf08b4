"""What a run saved so far, from its own journal: its training time compared with the dense baseline that it timed itself.

A plateau's `control` line has the time of a dense step there; removed examples would have been more such steps. Speedup,
weighted by time over the plateaus: sum of (seconds x dense step / own step / kept share of examples) / sum of seconds. The probes of
`examples.rule: probe` are own time that a dense run does not spend; in multiply-adds a probed image counts a third of its
forward pass's share, because a training image has a backward pass of twice its forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.journal.reader import lineage

EVERYTHING = (1.0, 1.0)  # keep_tokens, keep_connections of a dense plan


class Savings(NamedTuple):
    """kept: share of the examples shown in the newest epoch. speedup: training time of a dense run on every example / own
    time, over the plateaus that were timed (None if there are none); bound: the same in multiply-adds, over the same plateaus.
    timed: their share of the training time."""

    kept: float
    speedup: float | None
    bound: float | None
    timed: float

    def text(self) -> str:
        part = f"; {self.timed:.0%} of it timed" if self.timed < 0.995 else ""
        return f"training time, dense on every example / own; bound {self.bound or float('nan'):.3f}x{part}"


def savings(lines: Iterable[dict[str, Any]]) -> Savings:
    """From the lines of a journal, oldest first. Plateaus with a dense plan are their own baseline and need no timing (under
    `compat: authors` they are timed: that attention is slower than timm's)."""
    seconds: dict[tuple[float, float], float] = defaultdict(float)
    whole: dict[tuple[float, float], float] = defaultdict(float)  # seconds, had every example been shown
    images: dict[tuple[float, float], float] = defaultdict(float)
    presented: dict[tuple[float, float], float] = defaultdict(float)  # images, had every example been shown
    share, speedup = {EVERYTHING: 1.0}, {EVERYTHING: 1.0}
    probing: dict[tuple[float, float], float] = defaultdict(float)  # seconds of probes after steps under this plan
    probed: dict[tuple[float, float], float] = defaultdict(float)  # their images, as dense training images
    dense, kept, last = float("nan"), 1.0, EVERYTHING
    for line in lines:
        kind, plan = line["kind"], (line.get("keep_tokens", 1.0), line.get("keep_connections", 1.0))
        if kind == "start":
            dense = line.get("multiply_adds", dense)
        elif kind == "epoch" and line.get("kept") and line.get("examples"):
            kept = line["kept"] / line["examples"]
        elif kind == "plateau" and plan != EVERYTHING:
            share[plan] = line.get("multiply_adds", float("nan")) / dense
        elif kind == "control" and "step_speedup" in line:
            speedup[plan] = line["step_speedup"]
        elif kind == "probe":
            probing[last] += line.get("seconds", 0.0)
            probed[last] += line.get("probed", 0) * line.get("multiply_adds", float("nan")) / dense / 3
        elif kind == "step":
            last = plan
            seconds[plan] += line.get("seconds", 0.0)
            whole[plan] += line.get("seconds", 0.0) / kept
            images[plan] += line.get("images", 0)
            presented[plan] += line.get("images", 0) / kept
    timed = [plan for plan in seconds if plan in speedup]
    own = sum(seconds[plan] + probing[plan] for plan in timed)
    work = sum(images[plan] * share.get(plan, float("nan")) + probed[plan] for plan in timed)
    return Savings(
        kept,
        sum(whole[plan] * speedup[plan] for plan in timed) / own if own > 0 else None,
        sum(presented[plan] for plan in timed) / work if work > 0 else None,
        own / (sum(seconds.values()) + sum(probing.values())) if own > 0 else 0.0,
    )


def savings_of(run: Path | str) -> Savings:
    """Of a run directory, along its lineage. Raises JournalError if it has no journal."""
    return savings(lineage(run))
