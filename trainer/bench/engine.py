"""`trilevel bench engine CONFIG`: what the engine costs. DDP and ZeRO 0 to 3 against the bare loop, on every device of this machine.

All of them live in the same processes and take turns, every other round backwards, so that a drifting machine drifts for all. A step
is forward, backward, clipping and optimizer at the final plan of the run, on random images: no loader. `bare` is the same network in
a plain loop, nothing sent and nothing read. A step takes as long as its slowest rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import Tensor, nn

from sparsity.types import Plan
from trainer.bench.paired import interval
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.config.run_config import Config
from trainer.data.order import Steps
from trainer.engine.engine import Engine
from trainer.model.build import build_model
from trainer.model.objective import Objective
from trainer.model.optimizer import build_optimizer
from trainer.model.schedule import last_plan

BARE = "bare"
ENGINES = {"ddp": ("ddp", 0)} | {f"zero{stage}": ("deepspeed", stage) for stage in range(4)}
WARM_UP = 3
EQUAL = 1.02  # a ratio below which one engine is not worth changing for another
TARGETS = {256: 1.05, 32: 1.3}  # x the bare loop, on a GPU
Step = Callable[[], None]


@dataclass(frozen=True)
class Measured:
    """rows: {"ROW@IMAGES": {median, min, max, unit: "ms", images_per_second, ratio (of bare, median over rounds), ratio_low,
    ratio_high (95 % interval), memory_mib}}, or {said} where a row could not be measured."""

    about: str
    rows: dict[str, dict[str, Any]]
    advice: list[str]

    def table(self) -> Table:
        table = Table(title=self.about, title_justify="left")
        table.add_column("")
        for column in ("images per device", "ms", "images/s", "of bare", "95 % interval", "memory MiB"):
            table.add_column(column, justify="right")
        for name, r in self.rows.items():
            row, _, images = name.partition("@")
            if "said" in r:
                table.add_row(row, images, "-", "-", "-", "-", "-")
                continue
            spread = f"{r['ratio_low']:.2f} - {r['ratio_high']:.2f}"
            rate = f"{r['images_per_second']:.0f}"
            table.add_row(row, images, f"{r['median']:.2f}", rate, f"{r['ratio']:.3f}", spread, f"{r['memory_mib']:.0f}")
        return table

    def text(self) -> str:
        said = [f"{name}: {row['said']}" for name, row in self.rows.items() if "said" in row]
        return "\n".join([*said, *self.advice])


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


def bench(config: Config, images: list[int], rounds: int = 20, only: list[str] | None = None) -> Measured:
    """Measure, on all ranks of this world; the answer is the same on all. Raises ConfigError for a row that there is not."""
    names = [BARE, *ENGINES]
    if unknown := [name for name in only or [] if name not in names]:
        raise ConfigError(f"--rows {','.join(unknown)}: unknown; there are {', '.join(names)}")
    names = [name for name in names if only is None or name in {BARE, *only}]
    rows: dict[str, dict[str, Any]] = {}
    world, where = 1, ""
    for count in images:
        found, engine = _at(config, count, rounds, names)
        rows |= {f"{name}@{count}": row for name, row in found.items()}
        world, where = engine.world, engine.device_name()
    on_gpu = torch.cuda.is_available()
    half = {"float32": "float32", "autocast": "bf16 autocast", "bf16": "bf16"}[config.engine.precision]
    about = f"{config.name}: {config.model.name}, {config.model.image_size} px, {world} process(es), {half}, {rounds} rounds, {where}"
    return Measured(about, rows, [advice(config, rows, count, on_gpu) for count in images])


def _at(config: Config, count: int, rounds: int, names: list[str]) -> tuple[dict[str, dict[str, Any]], Engine]:
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, Any]] = {}
    engine = Engine(config.engine.model_copy(update={"kind": "ddp", "zero": 0, "deepspeed": None}), Steps(count, 1, count))
    engine.forget()  # speaks for the world below; its model is never used
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
    times = _interleaved(steps, rounds, engine)
    for name, seconds in times.items():
        ratios = [mine / bare for mine, bare in zip(seconds, times[BARE], strict=True)]
        low, high = interval(ratios)
        found[name] |= {
            "median": 1000 * median(seconds),
            "min": 1000 * min(seconds),
            "max": 1000 * max(seconds),
            "unit": "ms",
            "images_per_second": engine.world * count / median(seconds),
            "ratio": median(ratios),
            "ratio_low": low,
            "ratio_high": high,
        }
    return found, engine


def _interleaved(steps: dict[str, Step], rounds: int, engine: Engine) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            engine.barrier()
            _synchronize(engine.device)
            started = time.perf_counter()
            steps[name]()
            _synchronize(engine.device)
            times[name].append(time.perf_counter() - started)
    everyones = engine.everyones([times])
    return {name: [max(rank[name][i] for rank in everyones) for i in range(rounds)] for name in times}


def _engined(config: Config, count: int, kind: str, zero: int) -> Step:
    """A step through our engine, as the loop takes it."""
    settings = config.resolved()
    settings["engine"] |= {"kind": kind, "zero": zero}
    config = parse(settings, f"engine.kind={kind}, engine.zero={zero}")  # refuses what does not go together
    engine = Engine(config.engine, Steps(count, 1, count), config.optim.clip)
    try:
        network = build_model(config)
        engine.prepare(network, build_optimizer(network, config.optim))
    finally:
        engine.forget()
    at_hand, objective = _batch(config, count, engine.device), Objective(config)
    total = count * engine.world

    def one() -> None:
        images, targets, draw, plan = at_hand
        record = engine.forward(images, plan, frozenset(), draw)
        engine.backward(objective.losses(record.logits, targets).sum() / total, last=True)
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
    objective = Objective(config)
    (images, targets, draw, plan), parameters = _batch(config, count, device), list(network.parameters())
    images = images.bfloat16() if half else images

    def one() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "autocast"):
            record = network(images, plan, frozenset(), draw)
        objective.losses(record.logits, targets).mean().backward()
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
    return images, targets, torch.arange(count, device=device), last_plan(config)


def _memory(device: torch.device, peak: bool) -> float:
    """Bytes: allocated on the GPU, its peak since the last call without `peak`; of a CPU what the process holds."""
    if device.type != "cuda":
        return float(psutil.Process().memory_info().rss)
    if peak:
        return float(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return float(torch.cuda.memory_allocated(device))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def advice(config: Config, rows: dict[str, dict[str, Any]], count: int, on_gpu: bool) -> str:
    """One line: what the configured engine costs, and which one to take."""
    ratios = {name: rows[f"{name}@{count}"]["ratio"] for name in ENGINES if "ratio" in rows.get(f"{name}@{count}", {})}
    head = f"{count} images per device: "
    if not ratios:
        return head + "no engine could be measured"
    mine = "ddp" if config.engine.kind == "ddp" else f"zero{config.engine.zero}"
    best = min(ratios, key=lambda name: ratios[name])
    fits = "this model fits" if best in ("ddp", "zero0") else "DDP does not fit or is no faster"
    costs = ", ".join(f"{_told(name)} {ratio:.2f} x" for name, ratio in ratios.items())
    target = next((limit for images, limit in TARGETS.items() if on_gpu and images == count), None)
    goal = f" (target for {_told(mine)}: {target} x)" if target and mine in ratios else ""
    if mine in ratios and ratios[mine] <= EQUAL * ratios[best]:
        return f"{head}{fits}; against the bare loop {costs}{goal}: {_told(mine)}, as configured, is as good as any"
    return f"{head}{fits}; against the bare loop {costs}{goal}: take {_keys(best)}"


def _told(name: str) -> str:
    return "DDP" if name == "ddp" else f"ZeRO {name[-1]}"


def _keys(name: str) -> str:
    return "engine.kind=ddp" if name == "ddp" else f"engine.zero={name[-1]}"
