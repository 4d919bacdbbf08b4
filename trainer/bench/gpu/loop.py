"""`make gpu PART=loop`: the training loop end to end, from JPEGs to the average, beside the step alone: share of its images/s, idle time of
the GPU, launches, and how often the host waits for the device, from a trace of the run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.bench.gpu import jobs, step, trace
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.data.shards.pack import pack

SHORT_SIDE = 256
# The EVERY steps up to TIMED are timed, in the second epoch, at whose begin the loader has nothing ready. In the first it has two
# batches per worker from the time of the first compilation, and again after the trace is written, enough for hundreds of steps
EVERY, TIMED, TRACED = 40, 240, (50, 53)
COPIES = 13  # of each image, so that an epoch has 130 steps


def part(host: Host) -> Iterator[Row]:
    folder = Path(tempfile.mkdtemp(prefix="gpu-loop-"))
    count = 96 if host.tiny else 2560
    yield "made images", lambda: _shards(folder, count)
    known: dict[str, Any] = {}

    def alone() -> Facts:
        facts = step.measured(host, step.configured(host), "dense", known, {})
        known["attention"] = facts["attention"]  # of the one token count: the runs need not time it again
        return facts

    yield "step alone", alone
    for where in ("workers", "device") if host.on_gpu else ("workers",):
        yield f"loop, decode_on={where}", lambda where=where: _looped(host, folder, where, known)


def _shards(folder: Path, count: int) -> Facts:
    """JPEGs of ImageNet's size, with the short side of packed shards."""
    size = jobs.photographs(folder / "images", count, COPIES)
    pack(str(folder / "images"), folder / "shards", short_side=SHORT_SIDE, workers=_cores(), progress=False)
    return {"images": COPIES * count, "bytes": size, "cores": _cores()}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _looped(host: Host, folder: Path, where: str, known: dict[str, Any]) -> Facts:
    """A run of the recipe on one device, all of its tokens kept: the first plateau is far."""
    batch = 12 if host.tiny else step.configured(host).data.micro_batch
    name, (first, last) = f"decode-on-{where}", TRACED
    shards = f"{folder}/shards/train-*.tar"
    words = [
        "train", str(step.SOURCE_ROOT / step.CONFIG), *(step.TINY if host.tiny else ()), f"data.train={shards}",
        f"data.validation={shards}", f"name={name}", "model.classes=2", f"data.batch={batch}", f"data.micro_batch={batch}",
        "data.lanes=1", "data.repeats=1", "data.window=512", f"data.workers={1 if host.tiny else max(1, _cores() - 2)}",
        f"data.decode_on={where}",
        "augment.policy_on=device", "control=0", "tracking.to=journal", f"stop_at={TIMED}step", f"log_every={EVERY}step",
        "evaluate.every=300ep", "checkpoint.every=300ep",
        f"trace.steps=[{first}, {last}]", f"engine.attention={known['attention'] if 'attention' in known and host.on_gpu else 'auto'}",
        "engine.compile=false" if host.tiny else "engine.compile=true", "plan.warmup=299ep",
    ]  # fmt: skip
    facts = jobs.trilevel(folder, *words)
    if not facts["ok"]:
        return facts
    line = jobs.steps_of(folder, name)[TIMED]
    rate = line["images_per_second"]
    facts |= {"images_per_second": rate, "data_wait": line["data_wait"]}
    if "dense" in known:
        alone = 1000 * known["dense"]  # ms; beyond it: images, targets, loss by example, average, bookkeeping, waits
        facts |= {"share_of_step": rate * known["dense"] / batch, "ms_beyond_step": 1000 * batch / rate - alone}
    return facts | trace.of_run(folder / "runs" / name, last - first + 1, host.on_gpu)
