"""Energy of a benchmark: RAPL's packages added up, its counters that start again, and machines without."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from trainer.telemetry.energy import EnergyMeter

CPU = torch.device("cpu")


def package(folder: Path, name: str, microjoules: int, limit: int = 1_000_000) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")


def test_packages_add_up_without_their_parts_and_across_the_start_of_a_counter(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 900_000)
    package(tmp_path, "intel-rapl:1", 100_000, 2_000_000)
    package(tmp_path, "intel-rapl:0:0", 777_000)
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.source == "RAPL"
    before = meter.joules()
    package(tmp_path, "intel-rapl:0", 200_000)
    package(tmp_path, "intel-rapl:1", 150_000, 2_000_000)
    package(tmp_path, "intel-rapl:0:0", 888_000)
    assert math.isclose(meter.joules() - before, 0.3 + 0.05)


def test_a_machine_without_counters_measures_nothing(tmp_path: Path) -> None:
    assert EnergyMeter(CPU, tmp_path).source == "" and math.isnan(EnergyMeter(CPU, tmp_path / "none").joules())
    (tmp_path / "intel-rapl:0").mkdir()
    assert EnergyMeter(CPU, tmp_path).source == "", "a counter that cannot be read"
