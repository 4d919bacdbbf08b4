"""`trilevel estimate CONFIG --nodes N --from BENCH.json`: estimate a run on N nodes without running it.

Combines measurements on one device (`bench step --json`), of the loader (`bench input --json`) and, if given, of a short run of one
process (its directory: time of a step outside its passes):
  step = max(loader, images per device x passes + engine + all-reduce); only the loader overlaps.
It overestimates if the engine reduces gradients during the backward pass. Evaluation and checkpoints are not included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from sparsity.types import Plan
from trainer.config.errors import ConfigError
from trainer.config.load import parse_recorded
from trainer.config.run_config import Config
from trainer.config.schema_run import EngineConfig
from trainer.data.loader.dataset import open_indexes
from trainer.journal.reader import lineage
from trainer.model.build import build_schedule
from trainer.model.schedule import Schedule, row_of
from trainer.preflight.check import CheckReport, check

GRADIENT_BYTES = {"bf16": 2, "autocast": 4, "float32": 4}  # per parameter, as the engine sends them


@dataclass(frozen=True)
class MeasuredRates:
    """Measurements.

    passes: {row: seconds per image of forward, backward and optimizer}.
    decode: core seconds per image.
    engine: seconds per step outside the passes.
    cpu: the passes ran on a CPU, with `threads` cores.
    """

    passes: dict[str, float]
    decode: float | None = None
    engine: float | None = None
    cpu: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run. parts: hours of each resource if it were the only one; demand: images/s of a node at the peak."""

    about: str
    steps: int
    hours: float
    devices: int
    parts: dict[str, float]
    images_per_second: float  # of a node, mean over the run
    demand: float
    bytes_per_second: float  # of a node, at the peak
    cores: int
    supply: float | None  # images/s that the cores of a node decode
    multiply_adds: float  # of the whole run, forward
    notes: tuple[str, ...]

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    def facts(self) -> dict[str, Any]:
        return {
            "simulation": True, "steps": self.steps, "hours": self.hours, "device_hours": self.hours * self.devices,
            "images_per_second_per_node": self.images_per_second, "images_per_second_per_node_peak": self.demand,
            "bytes_per_second_per_node": self.bytes_per_second, "images_per_second_per_core": self.demand / self.cores,
            "images_per_second_decoded": self.supply, "multiply_adds": self.multiply_adds, "hours_of": self.parts,
            "bottleneck": self.bottleneck, "notes": list(self.notes),
        }  # fmt: skip

    def table(self) -> Table:
        table = Table(title=f"{self.about}: estimate, simulated and not measured", title_justify="left", show_header=False)
        table.add_column(justify="left")
        table.add_column(justify="right")
        table.add_column(justify="left")
        table.add_row("steps", f"{self.steps:,}", "")
        table.add_row("hours", f"{self.hours:.4g}", "training steps; without evaluation and checkpoints")
        table.add_row("device hours", f"{self.hours * self.devices:.4g}", f"{self.devices} device(s)")
        table.add_row("multiply-adds", f"{self.multiply_adds:.3g}", "forward, whole run")
        table.add_row("images/s per node", f"{self.images_per_second:,.0f}", f"mean; {self.demand:,.0f} at the peak")
        table.add_row("MB/s per node", f"{self.bytes_per_second / 1e6:,.1f}", "read, at the peak")
        have = "decoding not measured" if self.supply is None else f"a core decodes {self.supply / self.cores:,.0f}"
        table.add_row("images/s per core", f"{self.demand / self.cores:,.1f}", f"needed on {self.cores} core(s); {have}")
        for name, hours in self.parts.items():
            table.add_row(f"{name} alone", f"{hours:.4g} h", "<- bottleneck" if name == self.bottleneck else "")
        return table

    def text(self) -> str:
        return "\n".join(f"note: {note}" for note in self.notes)


def read(paths: list[str]) -> MeasuredRates:
    """Read JSON files of `bench step` and `bench input`, and run directories. Raises ConfigError for anything else."""
    passes, decode, runs, cpu, threads = {}, None, [], False, 1
    for path in paths:
        if Path(path).is_dir():
            runs.append(Path(path))
            continue
        try:
            rows = json.loads(Path(path).read_text())
            unit = rows["ours"]["unit"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--from {path}: {type(error).__name__}: {error}; give the JSON of `bench step` or `bench input`, or a run directory"
            ) from error
        if unit == "ms":
            passes = {name: 1 / row["images_per_second"] for name, row in rows.items() if row.get("unit") == "ms"}
            cpu, threads = bool(rows["run"].get("cpu", False)), int(rows["run"].get("threads", 1))
        else:
            decode = rows["ours"]["cpu_ms"] / 1000
    if not passes:
        raise ConfigError(
            f"--from {' '.join(paths)}: no step times in it; measure them: trilevel bench step CONFIG --json FILE"
        )
    found = MeasuredRates(passes, decode, None, cpu, threads)
    beyond = [seconds for run in runs for seconds in _beyond(run, found)]
    return MeasuredRates(passes, decode, max(0.0, median(beyond)) if beyond else None, cpu, threads)


def estimate(
    config: Config, bench: MeasuredRates, nodes: int, processes: int = 1, bandwidth: float | None = None, cores: int = 1
) -> Estimate:
    """Estimate the run on `nodes` x `processes` devices. Raises ConfigError.

    config: of the run.
    bench: measurements of this configuration.
    processes: devices per node.
    bandwidth: GB/s of a node's network; on one node, between its processes. None: all-reduce takes no time.
    cores: CPU cores per node.
    """
    _refuse_impossible(nodes, processes, bandwidth, cores)
    world = nodes * processes
    checked, (index, _) = check(config, world), open_indexes(config.data, verify=False)
    local = config.data.batch / world  # images of a device in a step
    # on a CPU, passes and decoding share the cores of a node
    slower = processes * bench.threads / cores if bench.cpu else 1.0
    ring = nodes if nodes > 1 else processes
    sent = 2 * (ring - 1) / ring * checked.parameters * GRADIENT_BYTES[config.engine.precision] * _volume(config.engine)
    reduce = sent / (bandwidth * 1e9) if bandwidth else 0.0
    engine, load = bench.engine or 0.0, local * processes * (bench.decode or 0.0) / cores
    parts = dict.fromkeys(("compute", "loader", "engine", "all-reduce"), 0.0)
    costs = {plateau.stretch.plan: plateau.multiply_adds for plateau in checked.plateaus}
    steps = total = multiply_adds = 0.0
    fastest = float("inf")
    schedule = build_schedule(config)
    for segment in _segments(schedule, config.data.batch, checked.images, bench.passes):
        compute = local * segment.passes * slower
        one = max(compute + engine + reduce + (load if bench.cpu else 0.0), load)
        for name, seconds in zip(parts, (compute, load, engine, reduce), strict=True):
            parts[name] += segment.steps * seconds
        steps, total, fastest = steps + segment.steps, total + segment.steps * one, min(fastest, one)
        multiply_adds += segment.steps * config.data.batch * costs[segment.plan]
    images, demand = steps * config.data.batch, config.data.batch / fastest / nodes
    size = float(index.length.mean()) if len(index) else 0.0
    return Estimate(
        about=f"{config.name}, {nodes} node(s) x {processes}", steps=round(steps), hours=total / 3600, devices=world,
        parts={name: seconds / 3600 for name, seconds in parts.items()}, images_per_second=images / total / nodes,
        demand=demand, bytes_per_second=demand * size, cores=cores,
        supply=cores / bench.decode if bench.decode else None,
        multiply_adds=multiply_adds,
        notes=(
            *_notes(bench, nodes, world, bandwidth, "" if schedule.shares_known else config.examples.method),
            *_probe_note(config), *_teacher_note(checked),
        ),
    )  # fmt: skip


def _refuse_impossible(nodes: int, processes: int, bandwidth: float | None, cores: int) -> None:
    for name, value in (("--nodes", nodes), ("--processes", processes), ("--cores", cores)):
        if value < 1:
            raise ConfigError(f"{name} {value}: must be >= 1")
    if bandwidth is not None and bandwidth <= 0:
        raise ConfigError(f"--bandwidth {bandwidth:g}: must be > 0, in GB/s")


def _notes(bench: MeasuredRates, nodes: int, world: int, bandwidth: float | None, deciding: str) -> Iterator[str]:
    """What the estimate counts as 0 or assumes. deciding: the method of level 1 that decides during the run what to remove, or ""."""
    device = "CPU" if bench.cpu else "GPU"
    yield f"step measured on a {device}: {bench.passes['ours'] * 1000:.3g} ms per image under the final plan"
    if not bench.decode:
        yield "loader not measured, counted as 0; add --from FILE of `trilevel bench input CONFIG --json FILE`"
    if bench.engine is None:
        yield "engine (a step's time outside its passes) not measured, counted as 0; add --from RUN of a short run"
    if not bandwidth and world > 1:
        yield "all-reduce counted as 0; set --bandwidth GB/s"
    if bandwidth and nodes == 1 and world > 1:
        yield "one node: --bandwidth is the bandwidth between its processes"
    if deciding:
        yield f"examples.method={deciding} decides during the run what to remove; counted as removing nothing"


def _probe_note(config: Config) -> Iterator[str]:
    if probe := config.examples.probe:
        share = probe.probe_share
        yield f"examples.rule=probe: its forward passes over {share:g} of the kept examples after each epoch are not counted"


def _teacher_note(checked: CheckReport) -> Iterator[str]:
    if checked.teacher:
        share = checked.teacher_share()
        yield (
            f"teacher: {checked.teacher / 1e9:.4g} GMACs per image, {share:.1%} of the multiply-adds of a step; its passes are not in the "
            f"step measurement and not counted: if time followed multiply-adds, compute would take {1 / (1 - share):.3f} times as long"
        )


@dataclass(frozen=True)
class _Segment:
    """Steps under one plan in one epoch; passes: seconds per image."""

    steps: float
    passes: float
    plan: Plan


def _segments(schedule: Schedule, batch: int, examples: int, passes: dict[str, float]) -> list[_Segment]:
    """Every plateau of the schedule with its measured passes. Raises ConfigError if the measurement has another schedule."""
    found = []
    for stretch in schedule.stretches():
        row = row_of(stretch, schedule.last())
        if row not in passes:
            raise ConfigError(
                f"--from: no row {row!r} in the step measurement (rows: {', '.join(passes)}): it has another schedule; measure this "
                "configuration: trilevel bench step CONFIG --json FILE"
            )
        for epoch in range(int(stretch.start), -(-int(stretch.end * 1e6) // 10**6)):
            inside = max(0.0, min(stretch.end, epoch + 1) - max(stretch.start, epoch))
            shown = examples - round(schedule.left_out(epoch) * examples)
            found.append(_Segment(stretch.share * inside * (shown // batch), passes[row], stretch.plan))
    return found


def _volume(engine: EngineConfig) -> float:
    """Communication relative to one all-reduce: ZeRO 3 gathers the parameters twice per step."""
    return 1.5 if engine.kind == "deepspeed" and engine.zero == 3 else 1.0


def _beyond(run: Path, bench: MeasuredRates) -> list[float]:
    """Seconds per step of a run of one process outside its passes and its data wait, one value per step line."""
    found: list[float] = []
    world, batch, schedule, first = 1, 1, None, True
    for line in lineage(run):
        if line["kind"] == "start":
            config = parse_recorded(line["config"], f"{run}/journal.jsonl")
            world, batch, first, schedule = line["world"], config.data.batch, True, build_schedule(config)
        elif line["kind"] == "step" and schedule is not None:
            if not first and line.get("images"):  # the first line includes the warm-up
                under = [s for s in schedule.stretches() if s.start <= line["progress"] < s.end]
                passes = sum(s.share * bench.passes.get(row_of(s, schedule.last()), 0.0) for s in under)
                found.append(line["seconds"] * (1 - line["data_wait"]) / (line["images"] / batch) - batch * passes)
            first = False
    if world != 1:
        raise ConfigError(f"--from {run}: run of {world} processes, which wait for each other; give a short run of one process")
    if not found:
        raise ConfigError(f"--from {run}: too short, no second step line; train some steps with log_every=10step")
    return found
