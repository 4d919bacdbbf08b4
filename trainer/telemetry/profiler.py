"""Profiling on demand: steps `trace.steps: [a, b]` of a run as a Chrome trace, and their memory.

RUN/traces/steps-A-B.rank-R.json.gz opens in chrome://tracing or ui.perfetto.dev. With `trace.memory` a GPU also gives
memory-A-B.rank-R.pickle, the allocator's history for pytorch.org/memory_viz; on a CPU the trace itself has every allocation.
Both are uploaded to MLflow. Steps count as in the journal: the first batch of a run is step 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.config.schema_run import TraceConfig as Settings

FOLDER = "traces"
EVENTS = 1_000_000  # allocations recorded by the memory snapshot


class Trace:
    """The profiler of this rank; does nothing if `settings` has no steps, or other ranks."""

    def __init__(self, settings: Settings, directory: Path, rank: int, gpu: bool, say: Callable[[str], None]):
        self._settings, self._gpu, self._say = settings, gpu, say
        self._folder, self._rank = directory / FOLDER, rank
        self._wanted = settings.steps is not None and rank in settings.ranks
        self._profiler: Any = None
        self._first = 0

    def at(self, behind: int) -> None:
        """Call before every step. behind: optimizer steps done."""
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
        """Call at the end of the attempt: writes what was recorded; a message if none of the steps was reached."""
        if self._profiler is not None:
            self._span.__exit__(None, None, None)
            self._write(behind)
        elif self._wanted and self._settings.steps is not None:
            self._say(
                f"trace.steps={list(self._settings.steps)}: no trace, this attempt ended at step {behind} without any of them"
            )
            self._wanted = False

    def _name(self, step: int) -> None:
        """Label the operators of a step with its number."""
        self._span = torch.autograd.profiler.record_function(f"step {step}")
        self._span.__enter__()

    def _start(self, step: int) -> None:
        """Begin to record; on failure, e.g. CUPTI without permission, a message, and the run continues."""
        from torch.profiler import ProfilerActivity, profile

        self._first = step
        if self._gpu and self._settings.memory:
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._gpu
        profiler = profile(activities=activities, profile_memory=self._settings.memory, record_shapes=True, acc_events=True)
        try:
            profiler.start()
        except (OSError, RuntimeError) as error:
            self._wanted = False
            if self._gpu and self._settings.memory:
                torch.cuda.memory._record_memory_history(enabled=None)
            self._say(f"trace.steps={list(self._settings.steps or [])}: no trace: {error}")
            return
        self._profiler = profiler
        self._name(step)

    def _write(self, last: int) -> None:
        """Write the trace; on failure a message, and the run continues."""
        profiler, self._profiler, self._wanted = self._profiler, None, False
        name = f"{self._first}-{last}.rank-{self._rank}"
        try:
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"steps-{name}.json.gz"
            path.unlink(missing_ok=True)  # a link that another user put there would be followed
            profiler.export_chrome_trace(str(path))
            self._say(f"trace of steps {self._first} to {last}: {path}")
            if self._gpu and self._settings.memory:
                memory = self._folder / f"memory-{name}.pickle"
                memory.unlink(missing_ok=True)
                torch.cuda.memory._dump_snapshot(str(memory))
                torch.cuda.memory._record_memory_history(enabled=None)
                self._say(f"memory of steps {self._first} to {last}: {memory}")
        except (OSError, RuntimeError) as error:
            self._say(f"trace of steps {self._first} to {last} not written: {error}")
