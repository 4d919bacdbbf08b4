"""`trilevel bench study FILE`: step time of each arm of a study under each plan of its schedule, relative to the reference's dense step.

Runs of a study share their machine, so their own times do not count. Here all computations are in one process, interleaved, with
nothing beside: forward, backward and optimizer step on random images, without loader and engine. Arms that compute the same share a
row. The JSON file, kept as `NAME/step_times.json` beside the journals, gives the page of the study its times.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from sparsity.types import DENSE, Plan
from trainer.analysis.study import step_times
from trainer.analysis.study.file import StudyFile
from trainer.bench.paired import TimedPlan, paired
from trainer.bench.result import BenchResult
from trainer.bench.step import compile_network
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.model.build import build_model, build_schedule, cost_of
from trainer.model.optimizer import build_optimizer
from trainer.run.directory import facts

COLUMNS = {
    "ms": "{median:.2f}",
    "of dense": "{ratio:.3f}",
    "95 % interval": "{ratio_low:.3f} - {ratio_high:.3f}",
    "multiply-adds": "{share:.3f}",
}
BASE = "dense"


def bench(file: StudyFile, arms: Sequence[str] | None = None, rounds: int = 30) -> BenchResult:
    """Measure on this machine's GPU, or else its CPU (float32). arms: only these, and the dense step of the reference. Raises
    ConfigError, also for arms with a teacher or pruned weights, whose work is not timed, and of another batch, image size, precision or
    optimizer.

    Rows: see `paired.paired`. In JSON also `arms`: {arm: [[start, end (epochs), share of the steps, row], ...]}, and `measured`: device,
    precision, threads, torch, date, commit, batch, rounds, and settings: {arm: `step_times.fingerprint`}.
    """
    for arm in arms or ():
        if arm not in file.arms:
            raise ConfigError(f"--arms {arm}: unknown arm; valid values: {', '.join(file.arms)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configs = {arm: _config(file, arm) for arm in file.arms if arm == file.reference or not arms or arm in arms}
    first = configs[file.reference]
    for arm, config in configs.items():
        _refuse(file, arm, config, first)
    timed, schedules = _rows(configs, file.reference)
    found = paired(
        timed, device, first.data.micro_batch, first.model.image_size, rounds, BASE,
        precision=None if first.engine.precision == "float32" else torch.bfloat16,
        optimizer=lambda network: build_optimizer(network, first.optim), show=f"bench study {file.name}",
    )  # fmt: skip
    code = facts()
    measured = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "precision": "float32" if device.type == "cpu" else first.engine.precision,
        "threads": torch.get_num_threads(), "torch": code["versions"]["torch"], "date": datetime.now(UTC).date().isoformat(),
        "commit": code["commit"], "batch": first.data.micro_batch, "rounds": rounds,
        "settings": {arm: step_times.fingerprint(config) for arm, config in configs.items()},
    }  # fmt: skip
    title = (
        f"{file.name}: {len(schedules)} arms, {len(timed)} computations, batch {first.data.micro_batch}, {first.model.image_size} px, "
        f"{rounds} rounds, {measured['device']}, {measured['precision']}, {measured['threads']} threads"
    )
    return BenchResult(title, found, COLUMNS, [], {"arms": schedules, "measured": measured})


def _config(file: StudyFile, arm: str) -> Config:
    return step_times.configured(file, arm).changed(model={"init": "random"})


def _refuse(file: StudyFile, arm: str, config: Config, first: Config) -> None:
    for key, ours, its in (
        ("teacher.from", config.teacher.source, "none"),
        ("weights.method", config.weights.method, "all"),
        ("data.batch", config.data.batch, first.data.batch),
        ("data.micro_batch", config.data.micro_batch, first.data.micro_batch),
        ("model.image_size", config.model.image_size, first.model.image_size),
        ("engine.precision", config.engine.precision, first.engine.precision),
        ("optim.name", config.optim.name, first.optim.name),
    ):  # fmt: skip
        if ours != its:
            raise ConfigError(
                f"{file.path}: {arm}: {key}={ours}: cannot be timed beside {file.reference} with {its}; name the other arms with --arms"
            )


def _rows(configs: dict[str, Config], reference: str) -> tuple[dict[str, TimedPlan], dict[str, Any]]:
    """The computations by row, and the schedule of each arm in rows. A dense stretch of an arm with the reference's network
    and engine is BASE."""
    first = configs[reference]
    base = build_model(first).dense()
    compile_network(base, first)
    whole = cost_of(base, DENSE)["multiply_adds"]
    rows = {BASE: TimedPlan(base, DENSE, 1.0)}
    names: dict[tuple[str, Plan], str] = {}
    networks: dict[str, Any] = {}
    schedules: dict[str, Any] = {}
    for arm, config in configs.items():
        stretches = build_schedule(config).stretches()
        key = step_times.computed(config)
        plain = (config.model, config.engine) == (first.model, first.engine) and config.compat == first.compat == "none"
        for at, stretch in enumerate(stretches):
            if stretch.plan == DENSE and plain:
                names[key, stretch.plan] = BASE
            elif (key, stretch.plan) not in names:
                if key not in networks:
                    networks[key] = build_model(config)
                    compile_network(networks[key], config)
                network, name = networks[key], f"{arm} {at}: epochs {stretch.text}"
                names[key, stretch.plan] = name
                rows[name] = TimedPlan(network, stretch.plan, cost_of(network, stretch.plan)["multiply_adds"] / whole)
        schedules[arm] = [[one.start, one.end, one.share, names[key, one.plan]] for one in stretches]
    return rows, schedules
