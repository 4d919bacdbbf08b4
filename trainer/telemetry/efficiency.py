"""Efficiency from a run's meters: token rate, MFU, goodput, device hours and energy of all attempts, killed ones too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trainer.journal.attempts import attempts_of
from trainer.journal.reader import FILE, read
from trainer.telemetry.meters import MeterReading

TRAINING = 3  # a step has about three times the multiply-adds of its forward pass: backward has twice as many


class Efficiency:
    """The earlier attempts, from the journal, and the current one. An attempt lasts from the start of its process to its last line;
    device hours and energy leave out the time between attempts."""

    def __init__(
        self, directory: Path, attempt: int, world: int, living: float, rate: float, before: tuple[float, float] = (0.0, 0.0)
    ):
        """attempt: the one that runs, of `world` processes; living: seconds that its process lived until now; rate: FLOP/s that
        its devices reach together in products of large matrices; before: seconds of training that survive and counted seconds
        before this attempt, see `goodput.before_attempt`."""
        self._world, self._began, self._rate = world, time.monotonic() - living, rate
        self.kept = 1.0  # share of the examples that this epoch shows
        self.cost: dict[str, Any] = {}  # of an image under this plan, see `model.cost_of`
        self._joules_now: float | None = None
        self._first = False  # whether the time to the first step was reported
        self._useful, self._counted = before
        lines = read(directory) if (directory / FILE).exists() else ()
        earlier = [one for number, one in attempts_of(lines).items() if number < attempt]
        self._device, self._joules = sum(one.device_seconds for one in earlier), sum(one.joules for one in earlier)

    def of(self, reading: MeterReading, spent: dict[str, float]) -> dict[str, float]:
        """Fields of a log line: keep_examples; tokens_per_second (computed tokens, mean over blocks); mfu: multiply-adds of the model
        under its plan x 2 x 3 x images/s as a share of `rate` (without recomputation by gradient checkpointing);
        time_to_first_step (s, from the start of the process, once); and `so_far`, for the seconds of this attempt by cause."""
        facts, per_second = {"keep_examples": self.kept}, reading.facts["images_per_second"]
        if self.cost:
            if tokens := self.cost["tokens"]:
                facts["tokens_per_second"] = per_second * sum(tokens) / len(tokens)
            facts["mfu"] = per_second * TRAINING * 2 * self.cost["multiply_adds"] / self._rate
        if not self._first and reading.first_step is not None:
            facts["time_to_first_step"] = reading.first_step - self._began
            self._first = True
        self._joules_now = reading.facts.get("joules")
        return facts | self.so_far(spent)

    def so_far(self, spent: dict[str, float]) -> dict[str, float]:
        """goodput: seconds of training steps that survive as a share of all counted seconds (see `analysis.report.goodput`, of which it
        is the value while the run goes on); device_hours: of all attempts, useful or not; energy_kwh of the devices where NVML tells."""
        now = time.monotonic() - self._began
        facts = {
            "goodput": (self._useful + spent.get("training", 0.0)) / max(self._counted + sum(spent.values()), 1e-9),
            "device_hours": (self._device + now * self._world) / 3600,
        }
        if self._joules_now is None:
            return facts
        return facts | {"energy_kwh": (self._joules + self._joules_now) / 3.6e6}
