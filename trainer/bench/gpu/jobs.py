"""Parts of `make gpu` that are whole processes: a run, the engines, the input pipeline."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.bench.gpu import processes
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.storage.source_tree import SOURCE_ROOT, python_path

CONFIG = "configs/tri_level_deit_small_0.7.yaml"
SETTINGS = [
    "engine.kind=ddp",
    "tracking.to=journal",
    "control=0",
    "data.workers=0",
    "stop_at=30step",
    "log_every=5step",
]
# steps of a run, between one that is sampled for its phases and one with a log line: both wait for the device
TRACED = (23, 24)
HALF = 0.1  # share by which the loss in bf16 may differ after 30 steps from that in float32
TINY = ["model.args={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}", "tokens.blocks=[0]", "data.batch=64"]


def run(host: Host) -> Iterator[Row]:
    """The quickstart on digits: on the CPU, on the device, compiled there, in bf16 and under DeepSpeed there."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-run-"))
    settings = SETTINGS + (TINY if host.tiny else [])
    yield "pack digits", lambda: trilevel(folder, "pack", "sklearn:digits", "shards/digits")
    yield "on the CPU", lambda: _trained(folder, "cpu", settings, CUDA_VISIBLE_DEVICES="")
    yield "on the device", lambda: _compared(folder, "device", settings, "cpu")
    if host.tiny:
        return
    compiled = [*settings, "engine.compile=true", f"trace.steps=[{TRACED[0]}, {TRACED[1]}]"]
    half, zero = "engine.precision=autocast", "engine.kind=deepspeed"
    rows = {"compiled": (compiled, 0.02), "compiled, autocast": ([*compiled, half], HALF)}
    rows |= {f"DeepSpeed, zero={stage}, autocast": ([*settings, zero, f"engine.zero={stage}", half], HALF) for stage in (1, 0)}
    rows |= {f"DeepSpeed, zero={stage}": ([*settings, zero, f"engine.zero={stage}"], 0.02) for stage in (1, 0, 2, 3)}
    for name, (words, within) in rows.items():
        yield name, partial(_compared, folder, name.replace(", ", "-").replace("=", ""), words, "cpu", within=within)


def resume(host: Host) -> Iterator[Row]:
    """The quickstart stopped and resumed on the device, to the bit, then on the CPU and on the device again."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-resume-"))
    settings = SETTINGS + (TINY if host.tiny else [])
    yield "pack digits", lambda: trilevel(folder, "pack", "sklearn:digits", "shards/digits")
    yield "whole", lambda: _trained(folder, "device", settings)
    stopped = [*settings, "stop_at=10step"]  # a log line, so that the next one has the mean of the same steps
    yield "stopped", lambda: _trained(folder, "resumed", stopped)
    yield "resumed", lambda: _compared(folder, "resumed", [*settings, "--resume"], "device", exact=True)
    yield (
        "resumed on the CPU",
        lambda: trilevel(folder, *_train("resumed", [*settings, "stop_at=35step", "--resume"]), CUDA_VISIBLE_DEVICES=""),
    )
    yield "resumed on the device again", lambda: trilevel(folder, *_train("resumed", [*settings, "stop_at=40step", "--resume"]))


def engine(host: Host) -> Iterator[Row]:
    """`trilevel bench engine` on one device: engines beside the bare loop, at full and at small batches."""
    small = ["model.image_size=32", "model.args={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}", "tokens.blocks=[1]"]
    words = ["--processes", "1", "--rounds", "2" if host.tiny else "20", *(small if host.tiny else [])]
    for images, rows in ((2, "ddp"),) if host.tiny else ((256, "ddp,zero1"), (32, "ddp,zero0,zero1")):
        command = [CONFIG, *words, "--images-per-device", str(images), "--rows", rows]
        yield f"engines, {images} images", lambda command=command: _bench(host, "engine", *command)


def images(host: Host) -> Iterator[Row]:
    """`trilevel bench input` on made images of ImageNet's size."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-input-"))
    count, copies = (12, 1) if host.tiny else (1500, 8)  # 12,000 files: each of 15 workers has 12 batches in a pass
    cores = len(os.sched_getaffinity(0))
    yield "made images", lambda: {"images": copies * count, "bytes": photographs(folder / "images", count, copies)}
    words = ["--images", str(folder / "images"), "--batch", "4" if host.tiny else "64", "--passes", "1" if host.tiny else "3"]
    whole = "ours" if host.tiny else "ours,ours_short_side,ours_jpegs,ours_on_device"
    most = 1 if host.tiny else max(1, cores - 1)
    for workers in sorted({most, max(1, most // 2), max(1, most // 4)}, reverse=True):
        rows = ["--workers", str(workers), "--rows", whole if workers == most else "ours,ours_short_side"]
        yield f"input, {workers} workers", lambda rows=rows: _bench(host, "input", CONFIG, *words, *rows)
    yield "pixels with decode_on=device", lambda: _device_pixels(folder, host.device)


def _device_pixels(folder: Path, device: torch.device) -> Facts:
    """Pixels of `data.decode_on: device` beside those of the workers, on the made images, in grey levels."""
    from trainer.bench.pixel_errors import device_errors
    from trainer.config.schema import DataConfig
    from trainer.data.shards.pack import pack

    index = pack(str(folder / "images"), folder / "shards", workers=1, progress=False)["train"]
    found = device_errors(index, DataConfig(train="", validation=""), 224, device)
    return found | {"ok": found["images"] > 0 and not found["refused"] and found["worst"] < 4.0}


def _bench(host: Host, *words: str) -> Facts:
    """Medians of a benchmark's rows, from its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        facts = trilevel(SOURCE_ROOT, "bench", *words, "--json", str(found))
        rows: dict[str, Any] = json.loads(found.read_text()) if found.is_file() else {}
    keys = ("median", "unit", "ratio", "images_per_second", "memory_mib", "launches", "idle", "note")
    return facts | {name: {key: row[key] for key in keys if key in row} for name, row in rows.items()}


def _train(name: str, settings: list[str]) -> list[str]:
    config = str(SOURCE_ROOT / "configs/quickstart.yaml")
    return ["train", config, "data.train=shards/digits/train-*.tar", "data.validation=shards/digits/validation-*.tar", f"name={name}",
            *settings]  # fmt: skip


def _trained(folder: Path, name: str, settings: list[str], **environment: str) -> Facts:
    facts = trilevel(folder, *_train(name, settings), **environment)
    steps = steps_of(folder, name)
    return facts | {"steps": max(steps, default=0), "loss": steps[max(steps)]["loss"] if steps else None}


def _traced(folder: Path, name: str) -> Facts:
    """Of a run's traced steps: waits and launches; graphs of the whole run. No idle time: these runs decode in the loop's process. Nothing
    for a run without a trace."""
    from trainer.bench.gpu import trace
    from trainer.journal.reader import lineage

    if not (folder / "runs" / name / "traces").is_dir():
        return {}
    graphs = [line.get("graphs") for line in lineage(folder / "runs" / name) if line["kind"] == "end"]
    found = trace.of_run(folder / "runs" / name, TRACED[1] - TRACED[0] + 1, on_gpu=torch.cuda.is_available())
    wanted = ("waits", "waited_ms", "held_ms", "launches", "ok", "error", "trace")
    return {key: found[key] for key in wanted if key in found} | {"graphs": graphs[-1] if graphs else None}


def _compared(folder: Path, name: str, settings: list[str], other: str, exact: bool = False, within: float = 0.02) -> Facts:
    """A run beside another one: the same batches (hash chain) and losses `within` a share, or equal."""
    facts = _trained(folder, name, settings)
    facts |= _traced(folder, name) if facts["ok"] else {}
    mine, theirs = steps_of(folder, name), steps_of(folder, other)
    both = sorted(mine.keys() & theirs.keys())
    same = bool(both) and all(mine[step]["chain"] == theirs[step]["chain"] for step in both)
    worst = max((abs(mine[step]["loss"] / theirs[step]["loss"] - 1) for step in both), default=float("nan"))
    return facts | {
        "same_batches": same,
        "worst_loss": worst,
        "ok": facts["ok"] and same and worst <= (0.0 if exact else within),
    }


def steps_of(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    from trainer.journal.reader import FILE, lineage

    if not (folder / "runs" / name / FILE).exists():
        return {}
    return {line["step"]: line for line in lineage(folder / "runs" / name) if line["kind"] == "step"}


def trilevel(folder: Path, *words: str, **environment: str) -> Facts:
    """Run a command; of a failing one its exit code and the end of its output."""
    variables = os.environ | {"PYTHONPATH": python_path()} | environment
    return processes.one([sys.executable, "-m", "trainer", *words], variables, folder)


def photographs(folder: Path, count: int, copies: int = 1) -> int:
    """JPEGs of 500 x 375 pixels of smooth noise, in two class folders, each as `copies` files (hard links); bytes of all files."""
    import numpy as np
    from PIL import Image

    rng, total = np.random.default_rng(0), 0
    for number in range(count):
        (folder / str(number % 2)).mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        path = folder / str(number % 2) / f"{number}.jpg"
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=95)
        for copy in range(1, copies):
            os.link(path, path.with_name(f"{number}-{copy}.jpg"))
        total += copies * path.stat().st_size
    return total
