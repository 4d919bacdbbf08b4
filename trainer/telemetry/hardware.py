"""What the machine is and how it fares: its rate of matrix products, energy and load of a GPU, load of the node.

NVML is asked where `nvidia-ml-py` is installed and the device is NVIDIA's; where it is not, its numbers are absent.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from typing import Any

import psutil
import torch

from trainer.telemetry.timing import seconds

MEASURING = 0.1  # seconds given to the matrix rate
SIZES = {"cpu": 512, "cuda": 8192}  # rows of the square matrices, so large that the rate no longer grows with them
MIB = 2**20


def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating point operations per second in products of large matrices, the best of a few, in the precision of a run
    (`engine.precision`): what the arithmetic of a step is held against. Under half a second."""
    kind = torch.float32 if precision == "float32" else torch.bfloat16
    size = SIZES.get(device.type, 512)
    a = torch.full((size, size), 0.5, dtype=kind, device=device)
    out, best = torch.empty_like(a), float("inf")
    ends = time.perf_counter() + MEASURING
    for turn in range(50):
        took = seconds(lambda: torch.mm(a, a, out=out), device)
        best = min(best, took) if turn else best  # the first one warms up
        if turn and time.perf_counter() > ends:
            break
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> float:
    """MiB that this process held at most: of a GPU what was allocated, else what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else MIB)


def since_start() -> float:
    """Seconds that this process lives."""
    return max(0.0, time.time() - psutil.Process().create_time())


class Gpu:
    """A GPU as NVML knows it; without one, or without NVML, every answer is empty."""

    FIELDS = ("gpu_utilization_percentage", "gpu_memory_usage_percentage", "gpu_power_usage_watts")

    def __init__(self, device: torch.device):
        self._nvml: Any = None
        if device.type != "cuda":
            return
        with contextlib.suppress(Exception):  # absent, or a driver that refuses: nothing then
            import pynvml  # pyright: ignore[reportMissingImports]

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._first = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._nvml = pynvml

    def joules(self) -> float:
        """Energy of the whole device since this object was made; nan where nobody counts."""
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                return (self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._first) / 1000
        return float("nan")

    def load(self) -> dict[str, float]:
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
                used = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
                watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
                return dict(zip(self.FIELDS, (float(used), 100 * memory.used / memory.total, watts), strict=True))
        return {}


class Node:
    """The load of this machine, in MLflow's names of system metrics; network: MB since this object was made."""

    FIELDS = (
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
        "network_receive_megabytes",
        "network_transmit_megabytes",
    )

    def __init__(self) -> None:
        psutil.cpu_percent()  # counts from here on
        self._network = psutil.net_io_counters()

    def load(self) -> dict[str, float]:
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        sent = received = 0.0
        if network and self._network:
            received = (network.bytes_recv - self._network.bytes_recv) / 1e6
            sent = (network.bytes_sent - self._network.bytes_sent) / 1e6
        return dict(zip(self.FIELDS, (psutil.cpu_percent(), memory.used / 1e6, memory.percent, received, sent), strict=True))
