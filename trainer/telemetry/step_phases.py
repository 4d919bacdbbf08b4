"""Times of the phases of a step, in sampled steps only, and exposed communication.

A sampled step synchronises the device at the end of every phase, so its phases are exact and it is slightly slower; all other
steps cost one `if`. Communication is measured in other, rarer steps by torch's profiler: it runs during backward and optimizer,
in parallel with computation, and only the exposed part costs time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.profiler import profile

from trainer.telemetry.timing import synchronize

log = logging.getLogger(__name__)
# data_wait: until the loader has a batch. host_to_device: its copy. forward: augmentation on the device, network, loss, bookkeeping of the
# rows. backward: with its communication. optimizer: with the EMA. rest: reductions, logging. A run with a teacher has one more: its
# forward pass.
PHASES: tuple[str, ...] = ("data_wait", "host_to_device", "forward", "backward", "optimizer", "rest")
TEACHER = "teacher"
WARM = 20  # steps before communication is first profiled
SELDOM = 500  # least number of steps between two profiled ones


class Phases:
    """The sampled steps of this rank. `end_phase(phase)` ends a phase; `begin` and `end` enclose a sampled step."""

    def __init__(self, device: torch.device, alone: bool):
        self._device, self._alone = device, alone
        self._sampling = self._watching = False
        self._at = self._began = 0.0
        self._seconds: dict[str, float] = {}
        self._steps, self._watch_from = 0, WARM
        self._profiler: Any = None
        self.shares: dict[str, float] = {}  # of the last sampled step, in [0, 1]; `communication` of the last profiled one
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and end on stderr otherwise

    def begin(self) -> None:
        """The next step is sampled."""
        synchronize(self._device)
        self._began = self._at = time.perf_counter()
        self._seconds, self._sampling = dict.fromkeys(PHASES, 0.0), True

    def end_phase(self, phase: str) -> None:
        """The time since the end of the previous phase belongs to `phase`."""
        if self._sampling:
            synchronize(self._device)
            now = time.perf_counter()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._at
            self._at = now
        elif self._watching and self._profiler is None:
            self._watch()

    def end(self, waited: float) -> None:
        """A step has ended, sampled or not; waited: seconds of it waiting for its batch."""
        self._steps += 1
        if self._sampling:
            self.end_phase("rest")
            whole = max(self._at - self._began, 1e-9)
            self._seconds["data_wait"] = waited
            self._seconds["rest"] = max(0.0, whole - sum(v for k, v in self._seconds.items() if k != "rest"))
            self.shares |= {phase: seconds / whole for phase, seconds in self._seconds.items()}
            self._sampling = False
        elif self._profiler is not None:
            self._stop_profiler()
        self._watching = not self._alone and self._steps >= self._watch_from

    def exclude(self, seconds: float) -> None:
        """Exclude time that belongs to no step: evaluation, a checkpoint."""
        self._at += seconds
        self._began += seconds

    def pop_shares(self) -> dict[str, float]:
        """The shares measured since the last call."""
        known, self.shares = self.shares, {}
        return known

    def _watch(self) -> None:
        if torch.autograd._profiler_enabled():  # by `Trace`: only one profiler can run
            return
        gpu = self._device.type == "cuda"
        synchronize(self._device)
        self._began = time.perf_counter()
        self._profiler = profile(use_cpu=not gpu, use_device="cuda" if gpu else None, use_kineto=True)
        try:
            self._profiler.__enter__()
        except Exception as error:  # CUPTI is missing, or another profiler holds it; a measurement must not end the training
            self._give_up(error)

    def _stop_profiler(self) -> None:
        synchronize(self._device)
        seconds = max(time.perf_counter() - self._began, 1e-9)
        profiler, self._profiler = self._profiler, None
        gpu = self._device.type == "cuda"
        where = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
        try:
            profiler.__exit__(None, None, None)
            events = [event for event in profiler.kineto_results.events() if event.device_type() == where]
        except Exception as error:
            return self._give_up(error)
        sent = exposed(((event.name(), event.start_ns(), event.end_ns()) for event in events), gpu)
        self.shares["communication"] = sent / 1e9 / seconds
        self._watch_from = self._steps + SELDOM

    def _give_up(self, error: Exception) -> None:
        self._profiler, self._alone, self._watching = None, True, False
        log.warning("communication is not measured: torch's profiler failed: %s", error)


def exposed(spans: Iterable[tuple[str, int, int]], gpu: bool) -> int:
    """Nanoseconds with communication and without computation, from (name, begin, end) of kernels or CPU operators.

    NCCL's kernels and gloo's operations communicate; all other kernels of a GPU compute, and of a CPU's operators those of ATen (the
    others are labels or enqueue work).
    """
    sent, computed = [], []
    for name, begin, end in spans:
        if name.startswith(("gloo:", "ncclDevKernel", "ncclKernel")):
            sent.append((begin, end))
        elif gpu or name.startswith("aten::"):
            computed.append((begin, end))
    return _covered(sent + computed) - _covered(computed)


def _covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, reach = 0, 0
    for begin, end in sorted(spans):
        begin = max(begin, reach)
        if end > begin:
            total += end - begin
            reach = end
    return total
