"""`trilevel bench engine CONFIG`: what the engine costs. DDP and ZeRO 0 to 3 against the bare loop, on every device of this machine.

All of them live in the same processes and take turns, every other round backwards, so that a drifting machine drifts for all. A step
is forward, backward, clipping and optimizer at the final plan of the run, on random images: no loader. `bare` is the same network in
a plain loop, nothing sent and nothing read. A step takes as long as its slowest rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sparsity.types import Plan
from trainer.bench.paired import interval
from trainer.bench.result import BenchResult, stats
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.config.run_config import Config
from trainer.data.order import BatchSplit
from trainer.engine.engine import Engine
from trainer.model.build import build_model, build_objective
from trainer.model.optimizer import build_optimizer
from trainer.model.schedule import Schedule
from trainer.telemetry import timing
from trainer.telemetry.timing import interleave

BARE = "bare"
ENGINES = {"ddp": ("ddp", 0)} | {f"zero{stage}": ("deepspeed", stage) for stage in range(4)}
WARM_UP = 3
EQUAL = 1.02  # a ratio below which one engine is not worth changing for another
Step = Callable[[], None]


COLUMNS = {
    "ms": "{median:.2f}",
    "images/s": "{images_per_second:.0f}",
    "of bare": "{ratio:.3f}",
    "95 % interval": "{ratio_low:.2f} - {ratio_high:.2f}",
    "memory MiB": "{memory_mib:.0f}",
}


def batches(text: str | None) -> list[int]:
    """Images per device, from `256,32`; None: what is worth measuring on this machine. Raises ConfigError."""
    words = (text or ("256,32" if torch.cuda.is_available() else "8,2")).split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--images-per-device {text}: write numbers with commas between: 256,32")
    return [int(word) for word in words]


def on_every_device(processes: int | None) -> None:
    """Start this very command again as one process per device and don't come back; nothing under a launcher, or for one process."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 2
    count = processes or devices
    if "WORLD_SIZE" in os.environ or count == 1:
        return
    if torch.cuda.is_available() and count > devices:
        raise ConfigError(f"--processes {count}: this machine has {devices} GPU(s), one process each")
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    sys.stdout.flush()
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [*agent, "-m", "trainer", *sys.argv[1:]])


def bench(config: Config, images: list[int], rounds: int = 20, only: list[str] | None = None) -> BenchResult:
    """Measure, on all ranks of this world; the answer is the same on all. Raises ConfigError for an unknown row.

    Rows "ROW@IMAGES": {median, min, max, unit: "ms", images_per_second, ratio (of bare, median over rounds), ratio_low, ratio_high
    (95 % interval), memory_mib}, or {said} where a row could not be measured.
    """
    names = [BARE, *ENGINES]
    if unknown := [name for name in only or [] if name not in names]:
        raise ConfigError(f"--rows: unknown value {', '.join(unknown)!r}; valid values: {', '.join(names)}")
    names = [name for name in names if only is None or name in {BARE, *only}]
    rows: dict[str, dict[str, Any]] = {}
    world, where = 1, ""
    for count in images:
        found, engine = _at(config, count, rounds, names)
        rows |= {f"{name}@{count}": row for name, row in found.items()}
        world, where = engine.world, engine.device_name()
    half = {"float32": "float32", "autocast": "bf16 autocast", "bf16": "bf16"}[config.engine.precision]
    about = f"{config.name}: {config.model.name}, {config.model.image_size} px, {world} process(es), {half}, {rounds} rounds, {where}"
    notes = [f"{name}: {row['said']}" for name, row in rows.items() if "said" in row]
    return BenchResult(about, rows, COLUMNS, [*notes, *(advice(config, rows, count) for count in images)])


def _at(config: Config, count: int, rounds: int, names: list[str]) -> tuple[dict[str, dict[str, Any]], Engine]:
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, Any]] = {}
    engine = Engine(config.engine.model_copy(update={"kind": "ddp", "zero": 0, "deepspeed": None}), BatchSplit(count, 1, count))
    engine.release_accelerate_state()  # speaks for the world below; its model is never used
    for name in names:
        before = _memory(engine.device, peak=False)
        try:
            steps[name] = _bare(config, count, engine.device) if name == BARE else _engined(config, count, *ENGINES[name])
            for _ in range(WARM_UP):
                steps[name]()
        except (ConfigError, torch.OutOfMemoryError) as error:
            steps.pop(name, None)
            oom = isinstance(error, torch.OutOfMemoryError)
            found[name] = {"said": "does not fit beside the others: try --rows" if oom else str(error).splitlines()[-1].strip()}
            continue
        found[name] = {"memory_mib": (_memory(engine.device, peak=True) - before) / 2**20}
    own = interleave({name: partial(_timed, engine, step) for name, step in steps.items()}, rounds)
    everyones = engine.all_gather_objects([own])
    times = {name: [max(seconds) for seconds in zip(*(rank[name] for rank in everyones), strict=True)] for name in own}
    for name, seconds in times.items():
        ratios = [mine / bare for mine, bare in zip(seconds, times[BARE], strict=True)]
        low, high = interval(ratios)
        found[name] |= stats([1000 * one for one in seconds], "ms") | {
            "images_per_second": engine.world * count / median(seconds),
            "ratio": median(ratios),
            "ratio_low": low,
            "ratio_high": high,
        }
    return found, engine


def _timed(engine: Engine, step: Step) -> float:
    """Seconds, on this rank, of a step that all ranks begin together."""
    engine.barrier()
    return timing.seconds(step, engine.device)


def _engined(config: Config, count: int, kind: str, zero: int) -> Step:
    """A step through our engine, as the loop takes it."""
    settings = config.resolved()
    settings["engine"] |= {"kind": kind, "zero": zero}
    config = parse(settings, f"engine.kind={kind}, engine.zero={zero}")  # refuses what does not go together
    engine = Engine(config.engine, BatchSplit(count, 1, count), config.optim.clip)
    try:
        network = build_model(config)
        engine.prepare(network, build_optimizer(network, config.optim))
    finally:
        engine.release_accelerate_state()
    at_hand, objective = _batch(config, count, engine.device), build_objective(config)
    total = count * engine.world

    def one() -> None:
        images, targets, rng_keys, plan = at_hand
        output = engine.forward(images, plan, frozenset(), rng_keys)
        engine.backward(objective.losses(output.logits, targets).sum() / total, last=True)
        engine.step()

    return one


def _bare(config: Config, count: int, device: torch.device) -> Step:
    """The same step without an engine."""
    network = build_model(config).to(device)
    if config.engine.compile:
        network.compile()
    half = config.engine.precision == "bf16"
    if half:
        network = network.bfloat16()
    optimizer = build_optimizer(network, config.optim)
    objective = build_objective(config)
    (images, targets, rng_keys, plan), parameters = _batch(config, count, device), list(network.parameters())
    images = images.bfloat16() if half else images

    def one() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "autocast"):
            output = network(images, plan, frozenset(), rng_keys)
        objective.losses(output.logits, targets).mean().backward()
        if config.optim.clip:
            nn.utils.clip_grad_norm_(parameters, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()

    return one


def _batch(config: Config, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """Images (b, 3, S, S), targets (b, C), keys of the random choices (b,), plan."""
    size, classes = config.model.image_size, config.model.classes
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    targets = nn.functional.one_hot(torch.arange(count) % classes, classes).float().to(device)
    return images, targets, torch.arange(count, device=device), Schedule(config).last()


def _memory(device: torch.device, peak: bool) -> float:
    """Bytes: allocated on the GPU, its peak since the last call without `peak`; of a CPU what the process holds."""
    if device.type != "cuda":
        return float(psutil.Process().memory_info().rss)
    if peak:
        return float(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return float(torch.cuda.memory_allocated(device))


def advice(config: Config, rows: dict[str, dict[str, Any]], count: int) -> str:
    """One line: what the configured engine costs, and which one to take."""
    ratios = {name: rows[f"{name}@{count}"]["ratio"] for name in ENGINES if "ratio" in rows.get(f"{name}@{count}", {})}
    head = f"{count} images per device: "
    if not ratios:
        return head + "no engine could be measured"
    mine = "ddp" if config.engine.kind == "ddp" else f"zero{config.engine.zero}"
    best = min(ratios, key=lambda name: ratios[name])
    fits = "this model fits" if best in ("ddp", "zero0") else "DDP does not fit or is no faster"
    costs = ", ".join(f"{_label(name)} {ratio:.2f} x" for name, ratio in ratios.items())
    if mine in ratios and ratios[mine] <= EQUAL * ratios[best]:
        return f"{head}{fits}; against the bare loop {costs}: {_label(mine)}, as configured, is as good as any"
    return f"{head}{fits}; against the bare loop {costs}: take {_keys(best)}"


def _label(name: str) -> str:
    return "DDP" if name == "ddp" else f"ZeRO {name[-1]}"


def _keys(name: str) -> str:
    return "engine.kind=ddp" if name == "ddp" else f"engine.zero={name[-1]}"
