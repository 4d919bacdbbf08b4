"""Timing that is robust to drift of the machine: synchronise the device, interleave rows, measure CPU time beside wall time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, TypeVar

import psutil
import torch

from trainer.data.progress import tracked

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work; a no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(one: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, including its work on the device."""
    synchronize(device)
    started = time.perf_counter()
    one()
    synchronize(device)
    return time.perf_counter() - started


def interleave(
    rows: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 0, show: str | None = None
) -> dict[str, list[T]]:
    """Call every row once per round; {row: what it returned, by round}, without the first `warm_up` rounds.

    The order of a round is random, that of the next one its reverse: a step is slower if the previous step freed memory in other
    block sizes, so in a fixed order the row after a sparse one would always be slower. The order is the same on all ranks.
    show: title of the progress, on standard error.
    """
    turns = [
        (number, name)
        for number in range(-warm_up, rounds)
        for name in Random(number // 2).sample(list(rows), len(rows))[:: 1 if number % 2 == 0 else -1]
    ]
    found: dict[str, list[T]] = {name: [] for name in rows}
    for number, name in tracked(turns, show or "", len(turns), "passes", show is not None):
        result = rows[name]()
        if number >= 0:
            found[name].append(result)
    return found


def cpu_seconds(without: int | None = None) -> float:
    """CPU time of this process and all its children so far, which other work on the machine hardly affects.
    without: process id of a child that is not counted because it simulates another machine. Where /proc is not mounted, only children
    that have ended are counted."""
    try:
        process = psutil.Process()
    except psutil.Error:
        return sum(os.times()[:4])
    own = process.cpu_times()
    children = [child.cpu_times() for child in process.children(recursive=True) if child.pid != without]
    return sum(t.user + t.system for t in [own, *children]) + own.children_user + own.children_system
