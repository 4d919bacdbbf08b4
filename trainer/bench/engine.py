"""`trilevel bench engine CONFIG`: step time of DDP and ZeRO 0 to 3 relative to a bare PyTorch loop, on every device of this machine.

All of them run in the same processes, interleaved, so that drift of the machine affects all alike. A step is forward, backward,
clipping and optimizer at the final plan of the run, on random images, without a loader. `bare` is the same network in a plain loop
without communication; `torch_ddp`, on several devices, that loop in torch's DistributedDataParallel with its defaults: what the
communication costs without our engine. The time of a step is that of its slowest rank.
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
from trainer.bench.gpu.kernels import profiled
from trainer.bench.paired import interval
from trainer.bench.result import BenchResult, stats
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.config.run_config import Config
from trainer.data.order import BatchSplit
from trainer.data.progress import tracked
from trainer.engine.engine import Engine
from trainer.engine.graph_cache import cache_whole_graphs
from trainer.model.build import build_model, build_objective, build_schedule
from trainer.model.optimizer import build_optimizer
from trainer.telemetry import timing
from trainer.telemetry.timing import interleave

BARE = "bare"
PLAIN = "torch_ddp"
ENGINES = {"ddp": ("ddp", 0)} | {f"zero{stage}": ("deepspeed", stage) for stage in range(4)}
WARM_UP = 3
TOGETHER = 10  # steps on a GPU between two synchronisations
PROFILED = 5  # steps of each row, behind the timed ones
OUT_OF_MEMORY = "out of memory beside the other rows; select fewer with --rows"
EQUAL = 1.02  # engines within this ratio count as equally fast
Step = Callable[[], None]


COLUMNS = {
    "ms": "{median:.2f}",
    "images/s": "{images_per_second:.0f}",
    "of bare": "{ratio:.3f}",
    "95 % interval": "{ratio_low:.2f} - {ratio_high:.2f}",
    "memory MiB": "{memory_mib:.0f}",
    "launches": "{launches:.0f}",  # of kernels and copies per step; on a GPU
    "idle": "{idle:.3f}",  # share of the time in which the GPU computes nothing
}


def batches(text: str | None, gpu: str = "256,32", cpu: str = "8,2", option: str = "--images-per-device") -> list[int]:
    """Batch sizes from text like `256,32`; None: the default, `gpu` or `cpu`. Raises ConfigError naming `option`."""
    words = (text or (gpu if torch.cuda.is_available() else cpu)).split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"{option} {text}: must be integers >= 1, separated by commas, e.g. 256,32")
    return [int(word) for word in words]


def on_every_device(processes: int | None) -> None:
    """Replace this process by torchrun with the same command, one process per device; a no-op under a launcher or for one process."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 2
    count = processes or devices
    if "WORLD_SIZE" in os.environ or count == 1:
        return
    if torch.cuda.is_available() and count > devices:
        raise ConfigError(f"--processes {count}: must be <= {devices}, the number of GPUs of this machine")
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    sys.stdout.flush()
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [*agent, "-m", "trainer", *sys.argv[1:]])


def bench(config: Config, images: list[int], rounds: int = 20, only: list[str] | None = None) -> BenchResult:
    """Measure, on all ranks; the result is the same on all. Raises ConfigError for an unknown row.

    Rows "ROW@IMAGES": {median, min, max, unit: "ms", images_per_second, ratio (of bare, median over rounds), ratio_low, ratio_high
    (95 % interval), memory_mib}, or {note: why} for a row that could not be measured.
    """
    names = [BARE, PLAIN, *ENGINES]
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
    notes = [f"{name}: {row['note']}" for name, row in rows.items() if "note" in row]
    if world == 1 and "ddp" in names:
        notes.append("one process: accelerate wraps nothing in DDP, whose row is the loop of a run without communication")
    return BenchResult(about, rows, COLUMNS, [*notes, *(advice(config, rows, count) for count in images)])


def _at(config: Config, count: int, rounds: int, names: list[str]) -> tuple[dict[str, dict[str, Any]], Engine]:
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, Any]] = {}
    engine = Engine(config.engine.model_copy(update={"kind": "ddp", "zero": 0, "deepspeed": None}), BatchSplit(count, 1, count))
    engine.release_accelerate_state()  # used below for rank and world size; it never gets a model
    names = [name for name in names if name != PLAIN or engine.world > 1]
    for name in tracked(names, f"bench engine, {count} images per device, warm-up", len(names), "rows", engine.is_main):
        before = _memory(engine.device, peak=False)
        try:
            steps[name] = (
                _engined(config, count, *ENGINES[name])
                if name in ENGINES
                else _bare(config, count, engine.device, name == PLAIN)
            )
            for _ in range(WARM_UP):
                steps[name]()
        except (ConfigError, ImportError, torch.OutOfMemoryError) as error:  # ImportError: DeepSpeed is not installed
            steps.pop(name, None)
            oom = isinstance(error, torch.OutOfMemoryError)
            found[name] = {"note": OUT_OF_MEMORY if oom else str(error).splitlines()[-1].strip()}
            continue
        found[name] = {"memory_mib": (_memory(engine.device, peak=True) - before) / 2**20}
    show = f"bench engine, {count} images per device" if engine.is_main else None
    own = interleave({name: partial(_timed, engine, step) for name, step in steps.items()}, rounds, show=show)
    launched = {name: profiled(engine.device, step, PROFILED) for name, step in steps.items()} if engine.on_gpu else {}
    gathered = engine.all_gather_objects([own])
    times = {name: [max(seconds) for seconds in zip(*(rank[name] for rank in gathered), strict=True)] for name in own}
    for name, seconds in times.items():
        ratios = [mine / bare for mine, bare in zip(seconds, times[BARE], strict=True)]
        low, high = interval(ratios)
        found[name] |= stats([1000 * one for one in seconds], "ms") | {
            "images_per_second": engine.world * count / median(seconds),
            "ratio": median(ratios),
            "ratio_low": low,
            "ratio_high": high,
        }
        found[name] |= {key: launched[name][key] for key in ("launches", "idle") if name in launched}  # of rank 0
    return found, engine


def _timed(engine: Engine, step: Step) -> float:
    """Seconds on this rank of a step, mean of some that all ranks start together: on a GPU of TOGETHER, because the host prepares a step
    while the device computes the one before, as in training."""
    steps = TOGETHER if engine.on_gpu else 1
    engine.barrier()

    def several() -> None:
        for _ in range(steps):
            step()

    return timing.seconds(several, engine.device) / steps


def _engined(config: Config, count: int, kind: str, zero: int) -> Step:
    """A step through our engine, as in the training loop."""
    settings = config.without_teacher().resolved()
    settings["engine"] |= {"kind": kind, "zero": zero}
    config = parse(settings, f"engine.kind={kind}, engine.zero={zero}")  # raises on conflicting settings
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


def _bare(config: Config, count: int, device: torch.device, wrapped: bool) -> Step:
    """The same step without an engine; wrapped: in torch's DistributedDataParallel."""
    network = build_model(config.without_teacher()).to(device)
    if config.engine.compile:
        cache_whole_graphs()  # as in the engine: the setting is in a graph's key, and both rows have the same graph
        network.compile()
    half = config.engine.precision == "bf16"
    if half:
        network = network.bfloat16()
    optimizer = build_optimizer(network, config.optim)
    objective = build_objective(config)
    (images, targets, rng_keys, plan), parameters = _batch(config, count, device), list(network.parameters())
    images = images.bfloat16() if half else images
    model = nn.parallel.DistributedDataParallel(network) if wrapped else network

    def one() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "autocast"):
            output = model(images, plan, frozenset(), rng_keys)
        objective.losses(output.logits, targets).mean().backward()
        if config.optim.clip:
            nn.utils.clip_grad_norm_(parameters, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()

    return one


def _batch(config: Config, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """Images (b, 3, S, S), targets (b, C), rng_keys (b,), plan."""
    size, classes = config.model.image_size, config.model.classes
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    targets = nn.functional.one_hot(torch.arange(count) % classes, classes).float().to(device)
    return images, targets, torch.arange(count, device=device), build_schedule(config).last()


def _memory(device: torch.device, peak: bool) -> float:
    """Bytes: on a GPU allocated, with `peak` the peak since the last call without it; on a CPU resident memory of the process."""
    if device.type != "cuda":
        return float(psutil.Process().memory_info().rss)
    if peak:
        return float(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return float(torch.cuda.memory_allocated(device))


def advice(config: Config, rows: dict[str, dict[str, Any]], count: int) -> str:
    """One line: step times relative to the bare loop, and which engine to use."""
    ratios = {name: rows[f"{name}@{count}"]["ratio"] for name in ENGINES if "ratio" in rows.get(f"{name}@{count}", {})}
    head = f"{count} images per device: "
    if not ratios:
        return head + "no engine could be measured"
    mine = "ddp" if config.engine.kind == "ddp" else f"zero{config.engine.zero}"
    best = min(ratios, key=lambda name: ratios[name])
    fits = "this model fits without sharding" if best in ("ddp", "zero0") else "DDP does not fit or is not faster"
    costs = ", ".join(f"{_label(name)} {ratio:.2f} x" for name, ratio in ratios.items())
    if mine in ratios and ratios[mine] <= EQUAL * ratios[best]:
        return (
            f"{head}{fits}; step time relative to the bare loop: {costs}; {_label(mine)}, as configured, is among the fastest"
        )
    return f"{head}{fits}; step time relative to the bare loop: {costs}; set {_keys(best)}"


def _label(name: str) -> str:
    return "DDP" if name == "ddp" else f"ZeRO {name[-1]}"


def _keys(name: str) -> str:
    return "engine.kind=ddp" if name == "ddp" else f"engine.zero={name[-1]}"
