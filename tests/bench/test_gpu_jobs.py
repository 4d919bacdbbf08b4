"""The processes that `make gpu` starts: their words in the tiny form and in the form for a GPU, and what is compared between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.bench.gpu import jobs, loop, trace
from trainer.bench.gpu.report import Host, record

FULL, TINY = (Host(torch.device("cpu"), tiny, Path()) for tiny in (False, True))


def started(monkeypatch: pytest.MonkeyPatch, part: Any, host: Host) -> dict[str, Any]:
    """{row: [words of its commands]}."""
    words: list[tuple[Any, ...]] = []

    def command(folder: Path, *given: str, **environment: str) -> dict[str, Any]:
        words.append((*given, *(f"{key}={value}" for key, value in environment.items())))
        return {"ok": True}

    monkeypatch.setattr(jobs, "trilevel", command)
    monkeypatch.setattr(jobs, "steps_of", lambda folder, name: {1: {"chain": "a", "loss": 1.0}})
    monkeypatch.setattr(jobs, "photographs", lambda folder, count, copies: copies * count)
    monkeypatch.setattr(jobs, "_device_pixels", lambda folder, device: {"ok": True})
    found = {}
    for row, work in part(host):
        words.clear()
        facts = work()
        found[row] = [*words] or facts
    return found


def of(words: tuple[str, ...], option: str) -> str:
    return words[words.index(option) + 1]


def test_engines_are_timed_at_full_and_at_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    full, tiny = (started(monkeypatch, jobs.engine, host) for host in (FULL, TINY))
    assert list(full) == ["engines, 256 images", "engines, 32 images"] and list(tiny) == ["engines, 2 images"]
    ((large,), (few,)), ((small,),) = full.values(), tiny.values()
    assert all(words[:3] == ("bench", "engine", jobs.CONFIG) for words in (large, few, small))
    assert (of(large, "--images-per-device"), of(large, "--rows"), of(large, "--rounds")) == ("256", "ddp,zero1", "20")
    assert (of(few, "--images-per-device"), of(few, "--rows"), of(few, "--rounds")) == ("32", "ddp,zero0,zero1", "20")
    assert (of(small, "--images-per-device"), of(small, "--rows"), of(small, "--rounds")) == ("2", "ddp", "2")
    assert "model.image_size=32" in small and "model.image_size=32" not in large
    assert of(large, "--processes") == of(small, "--processes") == "1"


def test_input_is_timed_with_all_cores_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda pid: range(16))
    full, tiny = (started(monkeypatch, jobs.images, host) for host in (FULL, TINY))
    assert full["made images"]["images"] == full["made images"]["bytes"] == 12_000 and tiny["made images"]["images"] == 12
    assert [row for row in full if row.startswith("input")] == ["input, 15 workers", "input, 7 workers", "input, 3 workers"]
    (words,), (few,), (small,) = full["input, 15 workers"], full["input, 3 workers"], tiny["input, 1 workers"]
    assert (of(few, "--workers"), of(few, "--rows")) == ("3", "ours,ours_short_side")
    assert [of(words, option) for option in ("--batch", "--passes", "--workers", "--rows")] == [
        "64",
        "3",
        "15",
        "ours,ours_short_side,ours_jpegs,ours_on_device",
    ]
    assert [of(small, option) for option in ("--batch", "--passes", "--workers", "--rows")] == ["4", "1", "1", "ours"]


def test_a_run_is_made_on_both_devices_compiled_in_bf16_and_under_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    full, tiny = (started(monkeypatch, jobs.run, host) for host in (FULL, TINY))
    assert list(tiny) == ["pack digits", "on the CPU", "on the device"] == list(full)[:3]
    zero = [f"DeepSpeed, zero={stage}" for stage in range(4)]
    half = ["compiled, autocast", "DeepSpeed, zero=0, autocast", "DeepSpeed, zero=1, autocast"]
    assert {*list(full)[3:]} == {"compiled", *zero, *half}
    assert {row for row, ((*_, last),) in full.items() if last == "CUDA_VISIBLE_DEVICES="} == {"on the CPU"}
    assert {row for row, (words,) in full.items() if "engine.compile=true" in words} == {"compiled", half[0]}
    assert {row for row, (words,) in full.items() if "engine.kind=deepspeed" in words} == {*zero, *half[1:]}
    assert {row for row, (words,) in full.items() if "engine.precision=autocast" in words} == {*half}
    assert {row for row, (words,) in full.items() if any(word.startswith("trace.steps") for word in words)} == {
        "compiled",
        half[0],
    }
    assert all(set(jobs.TINY) <= set(words) for row, (words,) in tiny.items() if row != "pack digits")
    assert not any(set(jobs.TINY) & set(words) for (words,) in full.values())
    names = [next(word for word in words if word.startswith("name=")) for row, (words,) in full.items() if row != "pack digits"]
    assert len({*names}) == len(names), "each row has a run of its own"


def test_a_run_is_stopped_and_resumed_also_on_the_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    full = started(monkeypatch, jobs.resume, FULL)
    again = "resumed on the device again"
    assert list(full) == ["pack digits", "whole", "stopped", "resumed", "resumed on the CPU", again]
    assert {row for row, ((*_, last),) in full.items() if last == "CUDA_VISIBLE_DEVICES="} == {"resumed on the CPU"}
    assert {row for row, (words,) in full.items() if "--resume" in words} == {"resumed", "resumed on the CPU", again}
    assert "stop_at=10step" in full["stopped"][0] and "stop_at=35step" in full["resumed on the CPU"][0]
    assert "stop_at=40step" in full[again][0]


def test_traced_steps_are_neither_sampled_nor_logged() -> None:
    """Both wait for the device. Sampled is the second step after a log line."""
    for (first, last), every in ((jobs.TRACED, 5), (loop.TRACED, loop.EVERY)):
        assert not {step % every for step in range(first, last + 1)} & {0, 2}
    assert (
        f"log_every={5}step" in jobs.SETTINGS and loop.TIMED % loop.EVERY == 0 and loop.TRACED[1] + 1 <= loop.TIMED - loop.EVERY
    )


@pytest.mark.parametrize(
    ("mine", "exact", "ok"),
    [
        ({1: ("a", 1.0), 2: ("b", 2.0)}, True, True),
        ({1: ("a", 1.0), 2: ("b", 2.0)}, False, True),
        ({1: ("a", 1.0), 2: ("b", 2.02)}, False, True),
        ({1: ("a", 1.0), 2: ("b", 2.02)}, True, False),
        ({1: ("a", 1.0), 2: ("b", 2.1)}, False, False),
        ({1: ("a", 1.0), 2: ("c", 2.0)}, False, False),
        ({3: ("a", 1.0)}, False, False),
        ({}, False, False),
    ],
)
def test_two_runs_agree_in_batches_and_losses(mine: Any, exact: bool, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {1: ("a", 1.0), 2: ("b", 2.0)}
    runs = {"mine": mine, "other": theirs}
    monkeypatch.setattr(jobs, "trilevel", lambda folder, *words, **environment: {"ok": True})
    monkeypatch.setattr(
        jobs,
        "steps_of",
        lambda folder, name: {step: {"chain": chain, "loss": loss} for step, (chain, loss) in runs[name].items()},
    )
    found = jobs._compared(Path(), "mine", [], "other", exact)
    assert found["ok"] is ok and found["steps"] == max(mine, default=0)
    monkeypatch.setattr(jobs, "trilevel", lambda folder, *words, **environment: {"ok": False, "error": "exit code 1"})
    assert jobs._compared(Path(), "mine", [], "other", exact)["ok"] is False


def test_medians_of_a_benchmark_come_from_its_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(folder: Path, *words: str, **environment: str) -> dict[str, Any]:
        Path(of(words, "--json")).write_text(json.dumps({"ours": {"median": 2.0, "unit": "ms", "min": 1.0, "ratio": 1.1}}))
        return {"ok": True}

    monkeypatch.setattr(jobs, "trilevel", command)
    assert jobs._bench(FULL, "input", jobs.CONFIG) == {"ok": True, "ours": {"median": 2.0, "unit": "ms", "ratio": 1.1}}


def test_pixels_of_the_device_are_compared_with_those_of_the_workers(tmp_path: Path) -> None:
    """On a CPU the host decodes for the device, so they are equal."""
    jobs.photographs(tmp_path / "images", 4)
    assert jobs._device_pixels(tmp_path, torch.device("cpu")) == {
        "images": 4,
        "refused": 0,
        "mean": 0.0,
        "worst": 0.0,
        "largest": 0.0,
        "ok": True,
    }


def test_a_trace_gives_idle_time_launches_and_the_waits_of_the_loop() -> None:
    def event(category: str, name: str, begin: float, length: float, thread: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length, "tid": thread}

    events = [
        event("user_annotation", "step 31", 0, 10), event("user_annotation", "step 32", 10, 10),
        event("gpu_user_annotation", "step 32", 10, 1000), event("kernel", "nvjet_gemm", 0, 6), event("gpu_memcpy", "Memcpy HtoD", 8, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 1, 60), event("cuda_runtime", "cudaLaunchKernel", 1, 1),
        event("cuda_runtime", "cudaEventSynchronize", 1, 2000), event("cuda_runtime", "cudaDeviceSynchronize", 21, 500),
        event("cuda_runtime", "cudaStreamSynchronize", 1, 99, thread=2),
        event("cpu_op", "aten::add", 0, 99), event("cpu_op", "autograd::engine::evaluate_function: AddmmBackward0", 0, 9, thread=3),
        event("cuda_runtime", "cudaStreamSynchronize", 1, 80, thread=3),
    ]  # fmt: skip
    found = trace.traced(events, 2, on_gpu=True)
    assert (found["waits"], found["launches"], found["ms"]) == (1.0, 1.0, 0.005), (
        "the thread that decodes waits for itself, the profiler behind the last step, and a host that is ahead for an event"
    )
    assert found["waited_ms"] == pytest.approx(0.07) and found["held_ms"] == 1.0
    assert found["idle"] == pytest.approx(0.2) and found["product_ms"] == 0.003
    unseen = trace.traced([one for one in events if not one["cat"].startswith(("cuda", "gpu", "kernel"))], 2, on_gpu=True)
    assert unseen["ok"] is False and "recorded no device" in unseen["error"]


def test_a_run_without_a_trace_keeps_its_other_numbers(tmp_path: Path) -> None:
    assert trace.of_run(tmp_path, 4, on_gpu=True) == {"trace": "none was written"}


@pytest.mark.slow
def test_the_loop_is_measured_in_its_tiny_form(tmp_path: Path) -> None:
    rows = {name: row() for name, row in loop.part(TINY)}
    assert (
        list(rows) == ["made images", "step alone", "loop, decode_on=workers"]
        and rows["made images"]["images"] == loop.COPIES * 96
    )
    found = rows["loop, decode_on=workers"]
    assert found["ok"] and found["images_per_second"] > 0 and 0 < found["share_of_step"] < 2 and found["launches"] > 100
    assert found["ms_beyond_step"] == pytest.approx(12_000 / found["images_per_second"] - rows["step alone"]["ms"])


def test_a_row_of_results_is_json_where_a_number_is_none(tmp_path: Path) -> None:
    record(
        "run",
        "compiled",
        {"worst_loss": float("nan"), "rows": [1.0, float("inf")]},
        Host(torch.device("cpu"), True, tmp_path),
        lambda line: None,
    )
    assert json.loads((tmp_path / "gpu.jsonl").read_text(), parse_constant=pytest.fail)["rows"] == [1.0, None]
