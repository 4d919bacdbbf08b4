"""Profiling on demand: `trace.steps: [a, b]` of a run as a Chrome trace, and what its memory held.

RUN/traces/steps-A-B.rank-R.json.gz opens in chrome://tracing or ui.perfetto.dev. With `trace.memory` a GPU also gives
memory-A-B.rank-R.pickle, the allocator's history for pytorch.org/memory_viz; on a CPU the trace itself holds every allocation.
Both go to MLflow with the run. Steps count as in the journal: the first batch of a run is step 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.config.schema import TraceConfig as Settings

FOLDER = "traces"
EVENTS = 1_000_000  # allocations remembered by the memory snapshot


class Trace:
    """The profiler of this rank; does nothing where `settings` name no steps, or other ranks."""

    def __init__(self, settings: Settings, directory: Path, rank: int, gpu: bool, say: Callable[[str], None]):
        self._settings, self._gpu, self._say = settings, gpu, say
        self._folder, self._rank = directory / FOLDER, rank
        self._wanted = settings.steps is not None and rank in settings.ranks
        self._profiler: Any = None
        self._first = 0

    def at(self, behind: int) -> None:
        """Before every step, and with `close` behind the last one; behind: optimizer steps that are done."""
        if not self._wanted or self._settings.steps is None:
            return
        first, last = self._settings.steps
        if self._profiler is not None:
            self._span.__exit__(None, None, None)
            if behind < last:
                self._name(behind + 1)
            else:
                self._write(behind)
        elif first <= behind + 1 <= last:
            self._start(behind + 1)

    def close(self, behind: int) -> None:
        """The attempt ends: what was recorded until now is written; steps that it never came to are named."""
        if self._profiler is not None:
            self._span.__exit__(None, None, None)
            self._write(behind)
        elif self._wanted and self._settings.steps is not None:
            self._say(
                f"trace.steps={list(self._settings.steps)}: this attempt made none of them, it ends at step {behind}; no trace"
            )
            self._wanted = False

    def _name(self, step: int) -> None:
        """The journal's number over the operators of a step."""
        self._span = torch.autograd.profiler.record_function(f"step {step}")
        self._span.__enter__()

    def _start(self, step: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._first = step
        if self._gpu and self._settings.memory:
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._gpu
        self._profiler = profile(
            activities=activities, profile_memory=self._settings.memory, record_shapes=True, acc_events=True
        )
        self._profiler.start()
        self._name(step)

    def _write(self, last: int) -> None:
        """A trace that can't be written is a message: the run goes on."""
        profiler, self._profiler, self._wanted = self._profiler, None, False
        name = f"{self._first}-{last}.rank-{self._rank}"
        try:
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"steps-{name}.json.gz"
            profiler.export_chrome_trace(str(path))
            self._say(f"trace of steps {self._first} to {last}: {path}")
            if self._gpu and self._settings.memory:
                memory = self._folder / f"memory-{name}.pickle"
                torch.cuda.memory._dump_snapshot(str(memory))
                torch.cuda.memory._record_memory_history(enabled=None)
                self._say(f"memory of steps {self._first} to {last}: {memory}")
        except (OSError, RuntimeError) as error:
            self._say(f"the trace of steps {self._first} to {last} could not be written: {error}")
