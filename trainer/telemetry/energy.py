"""Energy of a benchmark: of the GPU from NVML, of the CPU from the counters of RAPL (Linux, /sys/class/powercap)."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from trainer.telemetry.hardware import Gpu

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """source: "NVML", "RAPL", or "" where the machine has neither or refuses to read it (RAPL: since Linux 5.10 for root alone)."""

    def __init__(self, device: torch.device, powercap: Path = POWERCAP):
        self._gpu = Gpu(device)
        packages = sorted(powercap.glob("intel-rapl:*")) if device.type == "cpu" else []
        self._packages = [path for path in packages if path.name.count(":") == 1]  # whole packages, not their parts again
        self._last, self._turns = [math.nan] * len(self._packages), [0] * len(self._packages)
        self.source = "" if math.isnan(self.joules()) else "RAPL" if self._packages else "NVML"

    def joules(self) -> float:
        """Energy up to now, to be subtracted; nan where it is not measured. RAPL's counters start again at a limit: read it at least once
        a minute."""
        if not self._packages:
            return self._gpu.joules()
        try:
            return sum(self._package(number) for number in range(len(self._packages)))
        except (OSError, ValueError):
            return math.nan

    def _package(self, number: int) -> float:
        path = self._packages[number]
        now, limit = (int((path / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
        self._turns[number] += now < self._last[number]
        self._last[number] = now
        return (now + self._turns[number] * limit) / 1e6
