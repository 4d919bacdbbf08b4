"""What a run cost over all attempts, rates that follow from the meters, and the hardware that a machine reports."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.journals import START, write
from trainer.run import description
from trainer.telemetry.efficiency import Efficiency
from trainer.telemetry.hardware import Gpu, Node, matrix_rate
from trainer.telemetry.meters import MeterReading


def test_device_hours_of_killed_attempts_count_and_gaps_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """100 s on 2 processes, of them 10 before the start line; an hour of nothing; then 50 s on 4."""
    first = [{"kind": "start", "time": 1010.0, "attempt": 0, "starting": 10.0} | START]
    first += [{"kind": "step", "time": 1000.0 + t, "attempt": 0, "step": t, "joules": 1000.0 * t} for t in (50, 100)]
    write(tmp_path, first)
    monkeypatch.setattr("time.monotonic", lambda: 4700.0)
    efficiency = Efficiency(tmp_path, attempt=1, world=4, living=20.0, rate=1e12, before=(60.0, 130.0))
    monkeypatch.setattr("time.monotonic", lambda: 4730.0)
    efficiency.kept, efficiency.cost = 0.5, {"tokens": [10, 5], "multiply_adds": 1e9}
    window = MeterReading({"images_per_second": 40.0, "joules": 5e4}, {}, {}, {}, first_step=4705.0)
    found = efficiency.of(window, {"start": 20.0, "training": 30.0})
    assert found["goodput"] == pytest.approx(90 / 180) and found["device_hours"] == pytest.approx((200 + 200) / 3600)
    assert found["energy_kwh"] == pytest.approx(1.5e5 / 3.6e6) and found["keep_examples"] == 0.5
    assert found["tokens_per_second"] == 40 * 7.5 and found["mfu"] == pytest.approx(40 * 6e9 / 1e12)
    assert found["time_to_first_step"] == pytest.approx(25)
    assert "time_to_first_step" not in efficiency.of(window, {"training": 50.0})
    assert efficiency.so_far({"training": 50.0}).keys() == {"goodput", "device_hours", "energy_kwh"}


def test_energy_is_absent_without_a_meter(tmp_path: Path):
    efficiency = Efficiency(tmp_path, attempt=0, world=1, living=1.0, rate=1e12)
    assert "energy_kwh" not in efficiency.of(MeterReading({"images_per_second": 1.0}, {}, {}, {}), {"training": 0.5})
    assert Gpu(torch.device("cpu")).load() == {} and Gpu(torch.device("cpu")).joules() != Gpu(torch.device("cpu")).joules()


@pytest.mark.parametrize("uuid", ["1-2", "GPU-1-2"])  # torch gives the first form, NVML wants the second
def test_the_readings_of_a_gpu_are_those_of_nvml(uuid: str, monkeypatch: pytest.MonkeyPatch):
    energy, asked = iter([1000, 6000]), list[str]()
    fake: Any = types.ModuleType("pynvml")
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = asked.append
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(energy)
    fake.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=1, total=4)
    fake.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=90)
    fake.nvmlDeviceGetPowerUsage = lambda handle: 250_000
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: types.SimpleNamespace(uuid=uuid))
    gpu = Gpu(torch.device("cuda"))
    assert asked == ["GPU-1-2"]
    assert gpu.joules() == 5.0 and gpu.joules() != gpu.joules()  # a driver that stops answering is no failure
    assert gpu.load() == dict(zip(Gpu.FIELDS, (90.0, 25.0, 250.0), strict=True))
    fake.nvmlInit = lambda: 1 / 0
    assert Gpu(torch.device("cuda")).load() == {}


def test_the_machine_reports_its_hardware():
    assert 1e7 < matrix_rate(torch.device("cpu"), "float32") < 1e15 and matrix_rate(torch.device("cpu"), "autocast") > 0
    assert set(Node().load()) == set(Node.FIELDS)


def test_the_environment_is_listed_and_holds_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("TORCH_HOME", "https://me:word@host/a?X-Amz-Signature=abc&b=c https://other/d?sig=e")
    text = description.environment()
    assert "torch==" + torch.__version__.split("+")[0] in text and "NCCL_DEBUG=WARN" in text and "hunter2" not in text
    assert "TORCH_HOME=https://host/a?... https://other/d?...\n" in text
