"""Sums kept on the device between two log lines and reduced over ranks once per line: no host sync in a step."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsity.types import Observation
from trainer.engine.processes import Processes
from trainer.telemetry.hardware import Gpu, Node, peak_memory
from trainer.telemetry.step_phases import PHASES, TEACHER, Phases

SYSTEM_EVERY = 10.0  # shortest time between two readings of a node's load, in seconds
_SHARES = (*PHASES, TEACHER, "communication")
_OWN: tuple[str, ...] = (
    *_SHARES,
    "memory_peak_mib",
    "joules",
    *Node.FIELDS,
    *Gpu.FIELDS,
)  # the readings of every rank, in this order


class StepClock(NamedTuple):
    """Since the start of the attempt, on this rank: steps, seconds (without pauses), seconds of them waiting for data."""

    steps: int
    seconds: float
    waited: float


class MeterReading(NamedTuple):
    """What lies between two log lines. facts: see `Meters.reduce`; broken: images, {id: reason}; ranks: {phase: its share of a
    step on every rank}; nodes: {host: {its load}}, where one was looked at; first_step: time.monotonic() when the first was done."""

    facts: dict[str, Any]
    broken: dict[int, str]
    ranks: dict[str, list[float]]
    nodes: dict[str, dict[str, float]]
    first_step: float | None = None


class Meters:
    """Weighted loss, accuracy under the correctness rule, images, times, memory; since the last `reduce`. Collective.

    parts: names of the losses of which the loss is made, see `Distillation.parts`.
    """

    def __init__(self, engine: Processes, parts: Sequence[str] = ()):
        self._engine, self._parts = engine, tuple(parts)
        sums = 4 + len(self._parts)  # w * loss, w, right, judged, w * each part
        self._sums = torch.zeros(sums, dtype=torch.float64, device=engine.device)
        self._images = 0
        self._broken: list[tuple[int, str]] = []
        self._waited = 0.0
        self._started = self._step_began = time.perf_counter()
        self._steps, self._step_seconds = 0, []
        self._began, self._all_steps, self._all_waited = self._started, 0, 0.0
        self._phases = Phases(engine.device, engine.world == 1)
        self._gpu, self._node = Gpu(engine.device), Node()
        self._looked = 0.0
        self.hosts = engine.all_gather_objects([os.uname().nodename])
        self._looks = self.hosts.index(self.hosts[engine.rank]) == engine.rank  # one rank per node reads its load
        self.end_phase = self._phases.end_phase
        self._first_step: float | None = None

    def add(
        self, losses: Tensor, weights: Tensor, observation: Observation, parts: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """One micro-batch; losses float32 (b,), weights (b,), both on the device. Losses that are not finite are left out. parts: the
        losses of which `losses` are made, (b,) each."""
        valid = observation.valid
        with torch.no_grad():
            finite, each = losses.isfinite(), [parts[name] for name in self._parts]
            losses, weights, *each = (torch.where(finite, values.detach(), 0.0) for values in (losses, weights, *each))
            sums = [(losses * weights).sum(), weights.sum(), (observation.correct & valid).sum(), valid.sum()]
            sums += [(part * weights).sum() for part in each]
            self._sums += torch.stack([one.to(torch.float64) for one in sums])

    def end_step(self, images: int, broken: list[tuple[int, str]], waited: float) -> None:
        """One step on this rank: images of weight above 0, broken ones (id, reason), seconds spent waiting for the batch."""
        self._phases.end(waited)
        now = time.perf_counter()
        self._first_step = self._first_step or time.monotonic()
        self._step_seconds.append(now - self._step_began)
        self._step_began = now
        self._images += images
        self._broken += broken
        self._waited += waited
        self._steps += 1
        self._all_steps += 1
        self._all_waited += waited
        if self._steps == 1:  # the second step after a log line is sampled: it contains no logging
            self._phases.begin()

    def reduce(self) -> MeterReading:
        """Collective, a host sync: returns the measurements over all ranks since the last call, and resets them.

        facts: loss (nats), loss_NAME of each of its parts, train_top1 (share, under the correctness rule), images_per_second (all
        ranks) and per device, step_ms (mean) and its 50th and 95th percentile on this rank, data_wait (share of the time, mean over
        ranks), images (over all ranks), seconds, phases {phase: {min, median, max over ranks, slowest: the rank of max,
        slowest_host}} as shares of a sampled step (with one rank: the median alone), memory_peak_mib (largest over ranks so far),
        joules (of all devices in this attempt, if NVML is available).
        """
        world, device = self._engine.world, self._engine.device
        counts = torch.tensor([self._images, len(self._broken), self._waited], dtype=torch.float64, device=device)
        own = torch.zeros(world, len(_OWN), dtype=torch.float64)
        own[self._engine.rank] = torch.tensor(self._own(), dtype=torch.float64)  # the others add 0: a gather
        totals = self._engine.all_reduce_sum(torch.cat([self._sums, counts, own.flatten().to(device)])).cpu()
        loss, weight, right, judged, *parts = totals[: len(self._sums)].tolist()
        images, broken, waited = totals[len(self._sums) :][:3].tolist()
        table = dict(zip(_OWN, totals[len(self._sums) + 3 :].view(world, len(_OWN)).numpy().T, strict=True))
        seconds = max(time.perf_counter() - self._started, 1e-9)
        half, most = np.percentile(self._step_seconds or [0.0], (50, 95))
        facts: dict[str, Any] = {
            "loss": loss / weight if weight else float("nan"),
            **{
                f"loss_{name}": part / weight if weight else float("nan") for name, part in zip(self._parts, parts, strict=True)
            },
            "train_top1": right / judged if judged else 0.0,
            "images_per_second": images / seconds,
            "images_per_second_per_device": images / seconds / world,
            "step_ms": 1000 * seconds / max(self._steps, 1),
            "step_ms_p50": 1000 * half,
            "step_ms_p95": 1000 * most,
            "data_wait": waited / world / seconds,
            "images": images,
            "seconds": seconds,
            "memory_peak_mib": round(float(table["memory_peak_mib"].max()), 1),
        }
        joules = table["joules"]
        if not np.isnan(joules).all():
            facts["joules"] = float(np.nansum(joules))
        known = {phase: table[phase] for phase in _SHARES if not np.isnan(table[phase]).all()}
        if known:
            facts["phases"] = {phase: self._spread(shares) for phase, shares in known.items()}
        ranks = {phase: [round(float(share), 4) for share in shares] for phase, shares in known.items()} if world > 1 else {}
        found = dict(self._engine.all_gather_objects(self._broken)) if broken else {}
        self._again()
        return MeterReading(facts, found, ranks, self._nodes(table), self._first_step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block (evaluation, a checkpoint) from the measurements."""
        started = time.perf_counter()
        yield
        away = time.perf_counter() - started
        self._started += away
        self._began += away
        self._step_began += away
        self._phases.exclude(away)

    @property
    def clock(self) -> StepClock:
        return StepClock(self._all_steps, time.perf_counter() - self._began, self._all_waited)

    def _again(self) -> None:
        alone = self._steps == 1  # every step is logged: then each one is sampled
        self._sums.zero_()
        self._broken, self._step_seconds = [], []
        self._images = self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()
        if alone:
            self._phases.begin()

    def _own(self) -> list[float]:
        """The readings of this rank; nan if it has none."""
        readings = self._phases.pop_shares() | {
            "memory_peak_mib": peak_memory(self._engine.device),
            "joules": self._gpu.joules(),
        }
        if time.monotonic() - self._looked >= SYSTEM_EVERY:
            self._looked = time.monotonic()
            readings |= (self._node.load() if self._looks else {}) | self._gpu.load()
        return [readings.get(name, float("nan")) for name in _OWN]

    def _spread(self, shares: np.ndarray) -> dict[str, Any]:
        slowest = int(np.nanargmax(shares))
        if len(shares) == 1:
            return {"median": round(float(shares[0]), 4)}
        spread = {"min": float(np.nanmin(shares)), "median": float(np.nanmedian(shares)), "max": float(np.nanmax(shares))}
        return {k: round(v, 4) for k, v in spread.items()} | {"slowest": slowest, "slowest_host": self.hosts[slowest]}

    def _nodes(self, table: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        nodes: dict[str, dict[str, float]] = {}
        gpus: dict[str, int] = {}
        for rank, host in enumerate(self.hosts):
            load = {name: table[name][rank] for name in Node.FIELDS}
            number = gpus[host] = gpus.get(host, -1) + 1
            load |= {name.replace("gpu_", f"gpu_{number}_", 1): table[name][rank] for name in Gpu.FIELDS}
            known = {name: round(float(value), 3) for name, value in load.items() if not np.isnan(value)}
            if known:
                nodes.setdefault(host, {}).update(known)
        return nodes
