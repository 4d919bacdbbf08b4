"""Measurements of the machine: rate of matrix products, energy and load of a GPU, load of the node.

Energy and GPU load come from NVML; they are absent without `nvidia-ml-py` or an NVIDIA GPU.
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

MEASURING = 0.1  # seconds for measuring the matrix rate
SIZES = {"cpu": 512, "cuda": 8192}  # rows of the square matrices; larger ones do not raise the rate
MIB = 2**20


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s in large matrix products, the best of several, in the precision of a run (`engine.precision`): the denominator of MFU.
    Takes less than half a second."""
    kind = torch.float32 if precision == "float32" else torch.bfloat16
    size = SIZES.get(device.type, 512)
    # random numbers: a GPU multiplies constants faster, because fewer of its bits switch (others measured 894 and 788 TFLOP/s, H200)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=generator, device=device).to(kind)
    out, best = torch.empty_like(a), float("inf")
    ends = time.perf_counter() + MEASURING
    for turn in range(50):
        took = seconds(lambda: torch.mm(a, a, out=out), device)
        best = min(best, took) if turn else best  # the first one is the warm-up
        if turn and time.perf_counter() > ends:
            break
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in MiB: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else MIB)


class Gpu:
    """Energy and load of a GPU, from NVML; without a GPU or NVML: nan and {}."""

    FIELDS = ("gpu_utilization_percentage", "gpu_memory_usage_percentage", "gpu_power_usage_watts")

    def __init__(self, device: torch.device):
        self._nvml: Any = None
        if device.type != "cuda":
            return
        with contextlib.suppress(Exception):  # NVML is missing or the driver refuses
            import pynvml  # pyright: ignore[reportMissingImports]

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._first = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._nvml = pynvml

    def joules(self) -> float:
        """Energy of the whole device since this object was created; nan if not measured."""
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
    """The load of this machine, under MLflow's names of system metrics; network: MB since this object was created. Without /proc there
    is none."""

    FIELDS = (
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
        "network_receive_megabytes",
        "network_transmit_megabytes",
    )

    def __init__(self) -> None:
        self._network = None
        with contextlib.suppress(OSError, psutil.Error):
            psutil.cpu_percent()  # counts from here on
            self._network = psutil.net_io_counters()

    def load(self) -> dict[str, float]:
        try:
            memory, network, busy = psutil.virtual_memory(), psutil.net_io_counters(), psutil.cpu_percent()
        except (OSError, psutil.Error):
            return {}
        sent = received = 0.0
        if network and self._network:
            received = (network.bytes_recv - self._network.bytes_recv) / 1e6
            sent = (network.bytes_sent - self._network.bytes_sent) / 1e6
        return dict(zip(self.FIELDS, (busy, memory.used / 1e6, memory.percent, received, sent), strict=True))
