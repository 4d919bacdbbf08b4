"""Where a step's time goes: borders in sampled steps, communication that nothing hides, spreads over ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsity.types import Observation
from trainer.telemetry import step_phases
from trainer.telemetry.meters import MeterReading, Meters
from trainer.telemetry.step_phases import PHASES, Phases, exposed

CPU = torch.device("cpu")


class Time:
    """A clock that is advanced by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def __call__(self, seconds: float) -> None:
        self.now += seconds


def step(watched: Phases | Meters, passes: Callable[[float], None], waited: float, forward: float, parts: int = 1) -> None:
    """One step of `parts` micro-batches as the loop marks it; every part 1 s of copy and 4 s of backward."""
    passes(waited + 0.5)
    for _ in range(parts):
        watched.end_phase("rest")
        passes(1)
        watched.end_phase("host_to_device")
        passes(forward)
        watched.end_phase("forward")
        passes(4)
        watched.end_phase("backward")
    passes(2)
    watched.end_phase("optimizer")
    passes(0.25)


def test_only_sampled_steps_are_timed_and_their_phases_are_the_whole(monkeypatch: pytest.MonkeyPatch):
    passes = Time(monkeypatch)
    watched = Phases(CPU, alone=True)
    step(watched, passes, waited=1, forward=3)
    watched.end(1)
    assert watched.pop_shares() == {}
    watched.begin()
    step(watched, passes, waited=1, forward=3, parts=2)
    watched.end(1)
    found = watched.pop_shares()
    seconds = dict(zip(PHASES, (1, 2, 6, 8, 2, 0.75), strict=True))
    assert found == pytest.approx({phase: s / sum(seconds.values()) for phase, s in seconds.items()})
    assert sum(found.values()) == pytest.approx(1) and watched.pop_shares() == {}


def test_what_is_hidden_by_arithmetic_costs_nothing():
    spans = [("aten::mm", 0, 100), ("aten::mm", 20, 50), ("gloo:all_reduce", 80, 150), ("gloo:all_reduce", 140, 160)]
    spans += [("c10d::allreduce_", 0, 500), ("autograd::engine", 0, 500), ("aten::add", 155, 158)]
    assert exposed(spans, gpu=False) == 57  # 100 to 160, less 155 to 158
    assert exposed([("gloo:all_reduce", 10, 20)], gpu=False) == 10 and exposed([("aten::mm", 0, 9)], gpu=False) == 0
    kernels = [("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 0, 100), ("void cutlass::gemm", 30, 60), ("Memset", 90, 95)]
    assert exposed(kernels, gpu=True) == 65


def test_the_profiler_sees_a_step_now_and_then_and_lets_a_trace_go_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_phases, "WARM", 2)
    monkeypatch.setattr(step_phases, "SELDOM", 3)
    watched, seen = Phases(CPU, alone=False), []
    for number in range(9):
        with torch.autograd.profiler.profile() if number == 2 else torch.no_grad():  # a trace of another run
            watched.end_phase("rest")
            torch.ones(4).add(1)
            watched.end(0.0)
        seen.append("communication" in watched.pop_shares())
    assert seen == [False, False, False, True, False, False, False, True, False]


class Bus:
    """Ranks as threads: `engine(rank)` has the collectives that Meters needs."""

    def __init__(self, hosts: list[str]):
        self.hosts, self._barrier, self._box = hosts, threading.Barrier(len(hosts)), [None] * len(hosts)

    def engine(self, rank: int) -> Any:
        bus = self

        class Engine:
            device, world = CPU, len(bus.hosts)

            def exchange(self, item: Any) -> list[Any]:
                bus._barrier.wait(60)
                bus._box[rank] = item
                bus._barrier.wait(60)
                return list(bus._box)

            def all_reduce_sum(self, tensor: Tensor) -> Tensor:
                return torch.stack(self.exchange(tensor.clone())).sum(0)

            def all_gather_objects(self, items: list[Any]) -> list[Any]:
                return [item for part in self.exchange(items) for item in part]

        Engine.rank = rank  # type: ignore[attr-defined]
        return Engine()


def windows(monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> list[MeterReading]:
    """Every rank's window of three steps; the forward pass of rank r takes 3 + r seconds by a clock of its own."""
    bus, found, clocks = Bus(hosts), [None] * len(hosts), threading.local()
    monkeypatch.setattr("time.perf_counter", lambda: getattr(clocks, "now", 0.0))
    monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"nodename": clocks.host}))

    def one(rank: int) -> None:
        clocks.now, clocks.host = 0.0, hosts[rank]

        def passes(seconds: float) -> None:
            clocks.now += seconds

        meters = Meters(bus.engine(rank))
        for _ in range(3):
            step(meters, passes, waited=1, forward=3 + rank)
            right = torch.tensor([True, False])
            observation = Observation(right, torch.ones(2), torch.zeros(2), torch.ones(2).bool())
            meters.add(torch.full((2,), float(rank)), torch.ones(2), observation)
            meters.end_step(2, [(7, "torn")] if rank == 0 else [], 1.0)
        found[rank] = meters.reduce()  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("failing", ["__enter__", "__exit__"])
def test_a_profiler_that_fails_ends_no_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
):
    """No CUPTI, or another profiler on the GPU: torch raises at the start or at the end of the profile."""

    class Refusing:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> None:
            self.raise_in("__enter__")

        def __exit__(self, *_: Any) -> None:
            self.raise_in("__exit__")

        def raise_in(self, where: str) -> None:
            assert where != failing, "CUPTI is busy"

    monkeypatch.setattr(step_phases, "profile", Refusing)
    monkeypatch.setattr(step_phases, "WARM", 1)
    watched = Phases(CPU, alone=False)
    for _ in range(4):
        step(watched, lambda seconds: None, waited=0, forward=0)
        watched.end(0)
    assert "communication" not in watched.pop_shares()
    (message,) = (record.message for record in caplog.records)  # once, not in every step
    assert message.startswith("communication is not measured: torch's profiler failed: CUPTI is busy")


def test_spreads_over_ranks_name_the_slowest(monkeypatch: pytest.MonkeyPatch):
    windowed = windows(monkeypatch, ["a", "a", "b"])
    facts = windowed[0].facts
    shares = [(3 + rank) / (11.75 + rank) for rank in range(3)]
    assert facts["phases"]["forward"] == {
        "min": round(shares[0], 4), "median": round(shares[1], 4), "max": round(shares[2], 4), "slowest": 2, "slowest_host": "b",
    }  # fmt: skip
    assert facts["phases"]["backward"]["slowest"] == 0
    assert windowed[0].ranks["forward"] == [round(share, 4) for share in shares]
    assert facts["loss"] == 1 and facts["images"] == 18 and windowed[0].broken == {7: "torn"}
    assert facts["step_ms_p50"] == facts["step_ms_p95"] == 11750 and facts["step_ms"] == 11750
    assert facts["images_per_second_per_device"] == pytest.approx(facts["images_per_second"] / 3)
    assert set(windowed[0].nodes) == {"a", "b"} and "cpu_utilization_percentage" in windowed[0].nodes["b"]
    assert "joules" not in facts and facts["memory_peak_mib"] > 0


def test_one_rank_has_no_spread(monkeypatch: pytest.MonkeyPatch):
    (window,) = windows(monkeypatch, ["a"])
    assert window.facts["phases"]["forward"] == {"median": round(3 / 11.75, 4)} and window.ranks == {}
    assert np.isclose(sum(spread["median"] for spread in window.facts["phases"].values()), 1, atol=1e-3)


def test_step_times_have_their_median_and_their_95th_percentile(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meters = Meters(Bus(["a"]).engine(0))
    for number in range(1, 101):  # steps of 1 to 100 ms
        now[0] += number / 1000
        meters.end_step(1, [], 0.0)
    facts = meters.reduce().facts
    assert (facts["step_ms_p50"], facts["step_ms_p95"]) == (pytest.approx(50.5, abs=0.1), pytest.approx(95.05, abs=0.1))
