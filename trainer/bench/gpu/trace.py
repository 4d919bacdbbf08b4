"""What the trace of a run (`trace.steps`) tells of its steps: launches, idle time of the GPU, and how often the loop waits for it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from trainer.bench.gpu import kernels
from trainer.bench.gpu.report import Facts

ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})  # categories of a Chrome trace
WAITS = ("StreamSynchronize", "DeviceSynchronize")  # of the CUDA runtime
HELD = "EventSynchronize"  # the host is steps ahead and waits for numbers of an earlier one: the device has work meanwhile
WAITED = 50.0  # microseconds from which one counts: of an event that is past it returns at once


def of_run(run: Path, steps: int, on_gpu: bool) -> Facts:
    """`traced` of the one trace of a run; where the profiler did not start there is none."""
    traces = [*(run / "traces").glob("*.json.gz")]
    return (
        traced(json.loads(gzip.open(traces[0]).read())["traceEvents"], steps, on_gpu)
        if traces
        else {"trace": "none was written"}
    )


def traced(events: list[dict[str, Any]], steps: int, on_gpu: bool) -> Facts:
    """Of the events of a Chrome trace: what the device did, and waits for it of the threads of the loop and of backward, per step; pinning
    and checkpoints wait in threads of their own. Waits count within a step's span alone: the profiler itself waits behind the last one.
    Without a GPU its operations stand for kernels."""
    spans = [
        (event["name"], round(1000 * event["ts"]), round(1000 * (event["ts"] + event["dur"])))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in (ON_DEVICE if on_gpu else ("cpu_op",))
    ]
    # of the host: Kineto gives the device spans of the same names, which reach to the end of its work
    named = [event for event in events if event.get("cat") == "user_annotation" and str(event["name"]).startswith("step ")]
    loop = {event.get("tid") for event in events if str(event.get("name", "")).startswith("autograd::engine")}
    loop |= {event.get("tid") for event in named}
    within = [
        event
        for event in events
        if event.get("cat") == "cuda_runtime"
        and event.get("tid") in loop
        and any(step["ts"] <= event["ts"] < step["ts"] + step["dur"] for step in named)
    ]
    if on_gpu and not within:
        return {"ok": False, "error": "the trace has no call of the CUDA runtime: the profiler recorded no device"}
    waited = [event["dur"] for event in within if event["name"].endswith(WAITS)]
    held = [event["dur"] for event in within if event["name"].endswith(HELD)]
    return kernels.summary(spans, steps) | {
        "waits": sum(duration >= WAITED for duration in waited) / steps,
        "waited_ms": sum(waited) / 1000 / steps,
        "held_ms": sum(held) / 1000 / steps,
    }
