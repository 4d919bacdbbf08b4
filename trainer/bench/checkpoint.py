"""`trilevel bench checkpoint CONFIG`: how long training stands still for a save, how long the disk takes, and what share of a run
that is. The network, optimizer, average and example statistics of the configuration are real, the images are random; written is
to `runs`, as a run would, and removed. Start it by torchrun or `python -m launch` to measure the gathering over several processes.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

from sparsity.types import DENSE
from trainer.bench.bookkeeping import stand_in
from trainer.bench.result import BenchResult, stats
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.order import BatchSplit
from trainer.engine.engine import Engine
from trainer.model.build import build_examples, build_model
from trainer.model.ema import Ema
from trainer.model.optimizer import build_optimizer
from trainer.model.weights import save_weights
from trainer.run.checkpointer import Checkpointer
from trainer.run.recorder import Recorder
from trainer.run.shutdown import Stop

EXAMPLES = 1_281_167  # ImageNet's, whose statistics are saved too
HOUR = 3600.0


class RecorderStub:
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


def bench(config: Config, saves: int = 5, examples: int = EXAMPLES) -> BenchResult | None:
    """Collective; None on all ranks but the first. Raises ConfigError, and OSError where `runs` can't be written.

    Rows `blocking`, `writing`: seconds of a save; `bytes`: MiB on the disk.
    """
    config = config.model_copy(update={"model": config.model.model_copy(update={"init": "random"})})
    batch_split = BatchSplit(2, 1, 2)
    engine = Engine(config.engine, batch_split, config.optim.clip)
    model = build_model(config)
    engine.prepare(model, build_optimizer(model, config.optim))
    ema = Ema(model.vit, config.optim.ema)
    level = build_examples(config, stand_in(examples, config.model.classes))
    selection = level.select(0, engine.all_gather)
    _step(engine, config)
    folder = Path(tempfile.mkdtemp(prefix=".bench-checkpoint-", dir=_made(Path(config.runs)))) if engine.is_main else Path()
    told = RecorderStub(folder)
    try:
        checkpointer = Checkpointer(config, engine, cast(Recorder, told), Stop(), "bench", ema, level)
        for number in range(saves + 1):  # the first one warms up
            checkpointer.save(TrainState(step=number + 1), selection, last=False)
            while checkpointer.writing:  # here nobody waits for it, as in training
                time.sleep(0.01)
            checkpointer.wait()
    finally:
        if engine.is_main:
            shutil.rmtree(folder)
    if not engine.is_main:
        return None
    precision = f"{config.engine.kind}, zero {config.engine.zero}, {config.engine.precision}"
    title = f"{config.name}: saves of {config.model.name} on {engine.device_name()}, {engine.world} process(es), {precision}"
    measured = {"blocking": (told.blocking, "s"), "writing": (told.writing, "s"), "bytes": (told.sizes, "MiB")}
    rows = {name: stats(values[1:], unit) for name, (values, unit) in measured.items()}
    blocking, writing, size = (row["median"] for row in rows.values())
    both = blocking + writing
    note = (
        f"training stands still for {blocking:.3f} s of a save, the disk takes {writing:.3f} s more beside it: at hourly saves "
        f"{blocking:.3f} / {HOUR:.0f} = {blocking / HOUR:.4%} of the run; checkpoint.asynchronous=false: {both:.3f} / {HOUR:.0f} = "
        f"{both / HOUR:.4%}. Once more in the memory of the first node while it is written: {size:.0f} MiB"
    )
    return BenchResult(title, rows, notes=[note])


def _step(engine: Engine, config: Config) -> None:
    """One step, so that the optimizer has a state."""
    size = config.model.image_size
    images = torch.randn(2, 3, size, size, device=engine.device)
    rng_keys = torch.arange(2, device=engine.device)
    logits = engine.forward(images, DENSE, frozenset(), rng_keys).logits
    logits = logits[0] if isinstance(logits, tuple) else logits
    engine.backward(logits.float().square().mean(), last=True)
    engine.step()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
