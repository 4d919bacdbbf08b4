"""A run on two processes records where its time is spent, its cost, the accuracy of each class, a trace of chosen steps; no MLflow."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import lines
from trainer.config.schema_run import TraceConfig as TraceSettings
from trainer.telemetry.profiler import Trace
from trainer.telemetry.step_phases import PHASES

pytestmark = pytest.mark.dist
SETTINGS = """
name: seen
epochs: 2
stop_at: 26step
log_every: 8step
control: 0.0
model: {name: deit_tiny_patch16_224, classes: 10, image_size: 32, args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
data: {train: TRAIN, validation: VALIDATION, batch: 32, micro_batch: 8, workers: 1, lanes: 4, window: 512}
augment: {crop: none, flip: 0.0}
optim: {lr: 1.0e-3, warmup: 1ep}
tokens: {method: topk, keep: 0.5, blocks: [1]}
engine: {zero: 1, precision: float32}
evaluate: {every: 26step, crop_pct: 1.0}
tracking: {to: journal}
trace: {steps: [3, 4], ranks: [0, 1], memory: true}
"""


@pytest.fixture(scope="module")
def settings(digits: Path) -> str:
    return SETTINGS.replace("TRAIN", f"{digits}/train-*.tar").replace("VALIDATION", f"{digits}/validation-*.tar")


def test_a_run_records_where_its_time_is_spent(trilevel: Callable, settings: str, tmp_path: Path):
    (tmp_path / "seen.yaml").write_text(settings)
    reported = trilevel(2, "train", "seen.yaml").stdout
    run = tmp_path / "runs" / "seen"
    steps = lines(run, "step")
    for line in steps:
        assert set(line["phases"]) - {"communication"} == set(PHASES)
        assert sum(spread["median"] for spread in line["phases"].values()) > 0.5
        for spread in line["phases"].values():
            assert 0 <= spread["min"] <= spread["median"] <= spread["max"] <= 1 and spread["slowest"] in (0, 1)
        assert 0 < line["goodput"] <= 1 and line["mfu"] > 0 and line["device_hours"] > 0 and line["keep_examples"] == 1
        assert line["step_ms_p50"] <= line["step_ms_p95"] and line["memory_peak_mib"] > 50
        assert line["tokens_per_second"] == pytest.approx(line["images_per_second"] * (17 + 17 + 9) / 3)
    watched = [line["phases"]["communication"] for line in steps if "communication" in line["phases"]]
    assert len(watched) == 1 and 0 < watched[0]["max"] < 1  # the 21st step; gradients travel by gloo
    assert [len(line["forward"]) for line in lines(run, "ranks")] == [2] * len(steps)
    assert [("time_to_first_step" in line) for line in steps] == [True] + [False] * (len(steps) - 1)
    (system,) = [{k: v for k, v in line.items() if isinstance(v, dict)} for line in lines(run, "system")][:1]
    assert all("cpu_utilization_percentage" in load for load in system.values()) and len(system) == 1

    (start,), (end,) = lines(run, "start"), lines(run, "end")
    assert start["classes"] == [str(i) for i in range(10)] and start["matrix_tflops"] > 0 and start["starting"] > 0
    assert end["goodput"] == pytest.approx(end["by_cause"]["training"] / sum(end["by_cause"].values())) and end["paused"] == 0
    assert steps[-1]["goodput"] == pytest.approx(steps[-1]["spent"]["training"] / sum(steps[-1]["spent"].values()), rel=0.01)
    assert end["device_hours"] >= steps[-1]["device_hours"]
    score = lines(run, "eval")[-1]
    assert len(score["per_class"]) == 10 and min(score["per_class"]) == pytest.approx(score["worst_class"], abs=1e-4)

    for rank in (0, 1):
        with gzip.open(run / "traces" / f"steps-3-4.rank-{rank}.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        names = {event.get("name", "") for event in events}
        assert {"step 3", "step 4", "[memory]"} <= names and "step 5" not in names
        assert any(name.startswith("aten::") for name in names) and any(name.startswith("gloo:") for name in names)
    assert reported.count("trace of steps 3 to 4") == 2
    assert [line["text"] for line in lines(run, "message") if "trace" in line["text"]] == [
        "trace of steps 3 to 4: runs/seen/traces/steps-3-4.rank-0.json.gz"
    ]
    assert "torch==" in (run / "environment.txt").read_text() and "| 0 - " in (run / "plan.md").read_text()
    assert not (run / "mlflow.json").exists() and sorted(path.name for path in run.parent.iterdir()) == ["seen"]


def test_a_trace_of_steps_that_never_came_is_reported(tmp_path: Path):
    message: list[str] = []
    trace = Trace(TraceSettings(steps=(200, 210)), tmp_path, 0, False, message.append)
    for step in range(5):
        trace.at(step)
    trace.close(5)
    trace.close(5)
    assert message == ["trace.steps=[200, 210]: no trace, this attempt ended at step 5 without any of them"]
    trace = Trace(TraceSettings(), tmp_path, 0, False, message.append)
    trace.close(5)
    assert len(message) == 1 and list(tmp_path.iterdir()) == []


def test_a_profiler_that_does_not_start_leaves_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(self: object) -> None:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr("torch.profiler.profile.start", refused)
    message: list[str] = []
    trace = Trace(TraceSettings(steps=(1, 2)), tmp_path, 0, False, message.append)
    for step in range(3):
        trace.at(step)
    trace.close(3)
    assert message == ["trace.steps=[1, 2]: no trace: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"] and list(tmp_path.iterdir()) == []
