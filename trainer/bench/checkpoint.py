"""`trilevel bench checkpoint CONFIG`: how long a save blocks training, how long writing takes, and their share of a run. Network,
optimizer, EMA and example statistics are those of the configuration, the images are random. Writes to `runs`, as a run does, and
deletes the files. Start it with torchrun or `python -m launch` to include the gathering over several processes.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from sparsity.types import DENSE
from trainer.bench.bookkeeping import stand_in
from trainer.bench.result import BenchResult, stats
from trainer.checkpoint import save_load
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.order import BatchSplit
from trainer.data.progress import tracked
from trainer.engine.engine import Engine
from trainer.model.build import build_examples, build_model
from trainer.model.ema import Ema
from trainer.model.optimizer import build_optimizer
from trainer.model.weights import save_weights
from trainer.run.checkpointer import Checkpointer
from trainer.run.shutdown import Stop
from trainer.storage.disk import Content, Disk

EXAMPLES = 1_281_167  # ImageNet-1k; their statistics are saved too
HOUR = 3600.0


class RecorderStub:
    """Replaces the run's Recorder: collects times and sizes of saves."""

    def __init__(self, directory: Path):
        self.directory, self.checkpoints = directory, directory / "checkpoints"
        self.blocking: list[float] = []
        self.writing: list[float] = []
        self.sizes: list[float] = []

    def sync(self) -> None: ...

    def weights(self, weights: dict[str, torch.Tensor]) -> Content:
        path = self.directory / "weights.safetensors"
        save_weights(path, weights)
        return Disk().content(path)

    def saved(self, state: TrainState, path: Path, blocking: float, seconds: float, weights: Content | None) -> None:
        self.blocking.append(blocking)
        self.writing.append(seconds)
        self.sizes.append(sum(file.stat().st_size for file in path.iterdir()) / 2**20)


def bench(config: Config, saves: int = 5, examples: int = EXAMPLES) -> BenchResult | None:
    """Collective; None on all ranks but the first. Raises ConfigError, and OSError if `runs` is not writable.

    Rows `blocking`, `writing`: seconds of a save; `bytes`: MiB on the disk.
    """
    config = config.changed(model={"init": "random"})
    batch_split = BatchSplit(2, 1, 2)
    engine = Engine(config.engine, batch_split, config.optim.clip)
    model = build_model(config)
    engine.prepare(model, build_optimizer(model, config.optim))
    ema = Ema(model.network, config.optim.ema)
    level = build_examples(config, stand_in(examples, config.model.classes))
    selection = level.select(0, engine.all_gather)
    _step(engine, config)
    folder = Path(tempfile.mkdtemp(prefix=".bench-checkpoint-", dir=_made(Path(config.runs)))) if engine.is_main else Path()
    recorder = RecorderStub(folder)
    try:
        store = partial(save_load.save_checkpoint, recorder.checkpoints, config=config, fingerprint="bench")
        asynchronous = config.checkpoint.asynchronous
        checkpointer = Checkpointer(store, asynchronous, engine, recorder, Stop(), ema, level)
        turns = range(saves + 1)  # the first one is the warm-up
        for number in tracked(turns, "bench checkpoint", len(turns), "saves", engine.is_main):
            checkpointer.save(TrainState(step=number + 1), selection, last=False)
            while checkpointer.writing:  # without blocking, as in training
                time.sleep(0.01)
            checkpointer.wait()
    finally:
        if engine.is_main:
            shutil.rmtree(folder)
    if not engine.is_main:
        return None
    precision = f"{config.engine.kind}, zero {config.engine.zero}, {config.engine.precision}"
    title = f"{config.name}: saves of {config.model.name} on {engine.device_name()}, {engine.world} process(es), {precision}"
    measured = {"blocking": (recorder.blocking, "s"), "writing": (recorder.writing, "s"), "bytes": (recorder.sizes, "MiB")}
    rows = {name: stats(values[1:], unit) for name, (values, unit) in measured.items()}
    blocking, writing, size = (row["median"] for row in rows.values())
    both = blocking + writing
    note = (
        f"a save blocks training for {blocking:.3f} s, writing takes {writing:.3f} s more in the background: with hourly saves "
        f"{blocking:.3f} / {HOUR:.0f} = {blocking / HOUR:.4%} of the run; checkpoint.asynchronous=false: {both:.3f} / {HOUR:.0f} = "
        f"{both / HOUR:.4%}. Extra memory on the first node while writing: {size:.0f} MiB"
    )
    return BenchResult(title, rows, notes=[note])


def _step(engine: Engine, config: Config) -> None:
    """One step, so that the optimizer has state."""
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
