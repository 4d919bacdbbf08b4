"""Sums kept on the device between two log lines and reduced over ranks once per line: no host sync in a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity.types import Outcome
from trainer.engine import Engine


class Clock(NamedTuple):
    """Since the start of the attempt, on this rank: steps, seconds (pauses left out), seconds of them waiting for data."""

    steps: int
    seconds: float
    waited: float


class Meters:
    """Weighted loss, accuracy under the correctness rule, images, waiting time; since the last `close`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._sums = torch.zeros(4, dtype=torch.float64, device=engine.device)  # w * loss, w, right, judged
        self._images = 0
        self._broken: list[tuple[int, str]] = []
        self._waited = 0.0
        self._started = time.perf_counter()
        self._steps = 0
        self._began, self._all_steps, self._all_waited = self._started, 0, 0.0

    def add(self, losses: Tensor, weights: Tensor, outcome: Outcome) -> None:
        """One micro-batch; losses float32 (b,), weights (b,), both on the device. Losses that are not finite are left out."""
        valid = outcome.valid
        with torch.no_grad():
            finite = losses.isfinite()
            losses, weights = (torch.where(finite, values.detach(), 0.0) for values in (losses, weights))
            parts = [(losses * weights).sum(), weights.sum(), (outcome.correct & valid).sum(), valid.sum()]
            self._sums += torch.stack([part.to(torch.float64) for part in parts])

    def count(self, images: int, broken: list[tuple[int, str]], waited: float) -> None:
        """One step on this rank: images of weight above 0, broken ones (id, reason), seconds spent waiting for the batch."""
        self._images += images
        self._broken += broken
        self._waited += waited
        self._steps += 1
        self._all_steps += 1
        self._all_waited += waited

    def close(self) -> tuple[dict[str, float], dict[int, str]]:
        """Collective, a host sync: means over all ranks since the last call, and start again.

        loss (nats), train_top1 (share, under the correctness rule), images_per_second (all ranks), step_ms, data_wait
        (share of the time, mean over ranks), images (over all ranks), seconds. Beside them the broken images, {id: reason}.
        """
        counts = torch.tensor([self._images, len(self._broken), self._waited], dtype=torch.float64, device=self._engine.device)
        sums = self._engine.sum(torch.cat([self._sums, counts])).tolist()
        seconds = max(time.perf_counter() - self._started, 1e-9)
        loss, weight, right, judged, images, broken, waited = sums
        facts = {
            "loss": loss / weight if weight else float("nan"),
            "train_top1": right / judged if judged else 0.0,
            "images_per_second": images / seconds,
            "step_ms": 1000 * seconds / max(self._steps, 1),
            "data_wait": waited / self._engine.world / seconds,
            "images": images,
            "seconds": seconds,
        }
        self._sums.zero_()
        found = dict(self._engine.everyones(self._broken)) if broken else {}
        self._broken = []
        self._images = self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()
        return facts, found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that evaluation or a checkpoint takes."""
        started = time.perf_counter()
        yield
        away = time.perf_counter() - started
        self._started += away
        self._began += away

    @property
    def clock(self) -> Clock:
        return Clock(self._all_steps, time.perf_counter() - self._began, self._all_waited)
