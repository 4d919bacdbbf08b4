"""`trilevel bench checkpoint CONFIG`: how long training stands still for a save, how long the disk takes, and what share of a run
that is. The network, optimizer, average and example statistics of the configuration are real, the images are random; written is
to `runs`, as a run would, and removed. Start it by torchrun or `python -m launch` to measure the gathering over several processes.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.table import Table

from sparsity.types import DENSE
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.order import Steps
from trainer.data.shards.index import Index
from trainer.engine.engine import Engine
from trainer.model.build import build_examples, build_model
from trainer.model.ema import Ema
from trainer.model.optimizer import build_optimizer
from trainer.model.weights import save_weights
from trainer.run.checkpointer import Saver
from trainer.run.recorder import Records
from trainer.run.shutdown import Stop

EXAMPLES = 1_281_167  # ImageNet's, whose statistics are saved too
HOUR = 3600.0


class Measured(NamedTuple):
    """rows: {"blocking", "writing": seconds of a save; "bytes": MiB on the disk}, each {median, min, max, unit}."""

    about: str
    rows: dict[str, dict[str, Any]]

    def table(self) -> Table:
        table = Table(title=self.about, title_justify="left")
        for column in ("", "median", "min", "max", "unit", "share of a run at hourly saves"):
            table.add_column(column, justify="right" if column else "left")
        for name, row in self.rows.items():
            share = f"{row['median'] / HOUR:.4%}" if row["unit"] == "s" else ""
            table.add_row(name, *[f"{row[key]:.3f}" for key in ("median", "min", "max")], row["unit"], share)
        return table

    def text(self) -> str:
        blocking, writing, size = (self.rows[name]["median"] for name in ("blocking", "writing", "bytes"))
        both = blocking + writing
        return (
            f"training stands still for {blocking:.3f} s of a save, the disk takes {writing:.3f} s more beside it: at hourly saves "
            f"{blocking:.3f} / {HOUR:.0f} = {blocking / HOUR:.4%} of the run; checkpoint.asynchronous=false: {both:.3f} / {HOUR:.0f} = "
            f"{both / HOUR:.4%}. Once more in the memory of the first node while it is written: {size:.0f} MiB"
        )


class Told:
    """Stands for the run's records: keeps what a save tells."""

    def __init__(self, directory: Path):
        self.directory, self.checkpoints = directory, directory / "checkpoints"
        self.blocking: list[float] = []
        self.writing: list[float] = []
        self.sizes: list[float] = []

    def sync(self) -> None: ...

    def weights(self, weights: dict[str, torch.Tensor]) -> None:
        save_weights(self.directory / "weights.safetensors", weights)

    def saved(self, _state: Any, path: Path, blocking: float, seconds: float) -> None:
        self.blocking.append(blocking)
        self.writing.append(seconds)
        self.sizes.append(sum(file.stat().st_size for file in path.iterdir()) / 2**20)


@dataclass(frozen=True)
class Examples:
    """Stands for the index: as much of it as the method of level 1 asks for."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def bench(config: Config, saves: int = 5, examples: int = EXAMPLES) -> Measured | None:
    """Collective; None on all ranks but the first. Raises ConfigError, and OSError where `runs` can't be written."""
    config = config.model_copy(update={"model": config.model.model_copy(update={"init": "random"})})
    steps = Steps(2, 1, 2)
    engine = Engine(config.engine, steps, config.optim.clip)
    model = build_model(config)
    engine.prepare(model, build_optimizer(model, config.optim))
    ema = Ema(model.vit, config.optim.ema)
    level = build_examples(config, cast(Index, Examples(np.arange(examples) % config.model.classes)))
    selection = level.select(0, engine.gather)
    _step(engine, config)
    folder = Path(tempfile.mkdtemp(prefix=".bench-checkpoint-", dir=_made(Path(config.runs)))) if engine.is_main else Path()
    told = Told(folder)
    try:
        saver = Saver(config, engine, cast(Records, told), Stop(), "bench", ema, level)
        for number in range(saves + 1):  # the first one warms up
            saver.save(TrainState(step=number + 1), selection, last=False)
            while saver.writing:  # here nobody waits for it, as in training
                time.sleep(0.01)
            saver.wait()
    finally:
        if engine.is_main:
            shutil.rmtree(folder)
    if not engine.is_main:
        return None
    precision = f"{config.engine.kind}, zero {config.engine.zero}, {config.engine.precision}"
    about = f"{config.name}: saves of {config.model.name} on {engine.device_name()}, {engine.world} process(es), {precision}"
    rows = {"blocking": (told.blocking, "s"), "writing": (told.writing, "s"), "bytes": (told.sizes, "MiB")}
    return Measured(about, {name: _row(values[1:], unit) for name, (values, unit) in rows.items()})


def _step(engine: Engine, config: Config) -> None:
    """One step, so that the optimizer has a state."""
    size = config.model.image_size
    images = torch.randn(2, 3, size, size, device=engine.device)
    draw = torch.arange(2, device=engine.device)
    logits = engine.forward(images, DENSE, frozenset(), draw).logits
    logits = logits[0] if isinstance(logits, tuple) else logits
    engine.backward(logits.float().square().mean(), last=True)
    engine.step()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _row(values: list[float], unit: str) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "unit": unit}
