"""`trilevel parity CONFIG`: our recipe and timm's own components, step by step on the same batches, until something differs.

Ours: SparseNetwork at keep ratio 1, our flip, normalisation, mixing of neighbours, objective, optimizer, learning rate and EMA.
timm's: see `timm_recipe`. Both sides train independently from their own initialisation, in float32 without drop path and dropout,
and every intermediate tensor is compared: bitwise unless a tolerance is given.

Not compared here: decoding and augmentation on the host (the tests compare them with timm), the engine, gradient clipping (the
same call on both sides), and the noise of random erasing (timm's is not keyed; both sides use ours).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from sparsity.types import DENSE
from trainer.config.run_config import Config
from trainer.data.augment.mixup import mix_images, sample
from trainer.data.augment.on_device import augment_on_device
from trainer.data.batch import Batch
from trainer.data.loader.build import training_stream
from trainer.data.loader.dataset import opened
from trainer.data.progress import progress_bar
from trainer.journal.file import plain
from trainer.model.build import build_model, build_objective, build_schedule
from trainer.model.ema import Ema
from trainer.model.optimizer import build_optimizer
from trainer.model.schedule import set_learning_rate
from trainer.preflight.timm_recipe import (
    LegacyGenerator,
    Timm,
    TracedTensor,
    clip,
    gradients,
    initial,
    parameters,
    rates,
    schedule_points,
    seed_of,
)

SCHEDULE_TOLERANCE = 1e-12  # progress in epochs and a count of steps differ in the last bit of a double


@dataclass(frozen=True)
class Divergence:
    """The first difference: its step (-1: before the first) and the largest difference in that tensor.

    relative: difference / largest absolute value of timm's tensor. ours, theirs: the two values at that place.
    """

    step: int
    what: str
    name: str
    difference: float
    relative: float
    ours: float
    theirs: float

    def __str__(self) -> str:
        when = "before the first step" if self.step < 0 else f"at step {self.step}"
        which = f"{self.what} {self.name}".strip()
        return (
            f"first divergence {when}: {which}, ours {self.ours:.9g}, timm's {self.theirs:.9g} (relative {self.relative:.3g})"
        )


@dataclass(frozen=True)
class Certificate:
    """The result of a comparison. `first` None: equal (within `tolerance`, 0 = bitwise) over all `steps`."""

    steps: int
    first: Divergence | None
    tolerance: float
    largest: dict[str, float] = field(default_factory=dict)  # kind of tensor -> largest relative difference
    losses: tuple[float, float] = (float("nan"), float("nan"))  # of the first and the last step
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        if self.first is not None:
            return str(self.first)
        how = "bitwise" if self.tolerance == 0 else f"within {self.tolerance:g}"
        loss = f"loss {self.losses[0]:.4f} -> {self.losses[1]:.4f}"
        return f"equal {how} over {self.steps} steps ({loss}): {', '.join(self.largest)}"

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(plain({"equal": self.equal, **asdict(self)}), indent=1) + "\n")


def parity(
    config: Config,
    steps: int = 200,
    *,
    against: Config | None = None,
    tolerance: float = 0.0,
    rows: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Certificate:
    """Run `steps` optimizer steps of both sides on the first `rows` (default: a micro-batch) of each global batch.

    config: the recipe, with its shards.
    against: configuration of timm's side, if it is not `config`.
    tolerance: largest relative difference that counts as equal; 0: bitwise.
    rows: rows per step.
    progress: show it on standard error.
    Raises DataError without shards, ConfigError if timm has no such model or option.
    """
    config, against = _plain(config), _plain(against or config)
    device, rows = torch.device(device), rows or config.data.micro_batch
    index = opened(config.data.train, config.data, config.data.verify)
    stream = training_stream(index, config, 0, 1)
    batches = stream.order(0, None).steps
    ours = _Ours(config, batches, device)
    theirs = Timm(against, batches, device, ours.model.state_dict() if config.model.init != "random" else None)
    facts = _facts(config, rows, device)
    compared = _Comparison(tolerance)
    found = compared.first(-1, ours.start(), theirs.start())
    presented = itertools.chain.from_iterable(stream.epoch(epoch, None) for epoch in itertools.count())
    step = 0
    with progress_bar(f"parity {config.name}", steps, "steps", progress) as shown:
        while found is None and step < steps:
            batch = _whole_pairs(next(presented), rows, device)
            found = compared.first(step, ours.step(step, batch), theirs.step(step, batch))
            step += 1
            shown.advance(shown.task_ids[0])
    ends = (compared.losses[0], compared.losses[-1]) if compared.losses else (float("nan"), float("nan"))
    return Certificate(step, found, tolerance, compared.largest, ends, facts)


class _Comparison:
    """Compares the two sides tensor by tensor. largest: {kind of tensor: largest relative difference}; losses: ours, of each step."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.largest: dict[str, float] = {}
        self.losses: list[float] = []

    def first(self, step: int, ours: Iterator[TracedTensor], theirs: Iterator[TracedTensor]) -> Divergence | None:
        """The first difference above the tolerance in the tensors of a step; both sides stop there."""
        for x, y in itertools.zip_longest(ours, theirs):
            if x is None or y is None or x[:2] != y[:2]:
                alone = x or y
                assert alone is not None
                return Divergence(step, alone.what, f"{alone.name} (on one side only)", *[float("nan")] * 4)
            if x.what == "loss" and x.name == "mean":
                self.losses.append(float(x.value.detach()))
            allowed = SCHEDULE_TOLERANCE if x.what == "learning rate" else self.tolerance
            relative, found = _compare(step, x, y)
            self.largest[x.what] = max(self.largest.get(x.what, 0.0), relative)
            if not relative <= allowed:
                return found
        return None


def _facts(config: Config, rows: int, device: torch.device) -> dict[str, Any]:
    """What was compared, for the JSON file."""
    return {
        "config": config.name,
        "fingerprint": config.fingerprint(),
        "model": config.model.name,
        "optimizer": config.optim.name,
        "loss": config.optim.loss,
        "initialisation": "compared" if config.model.init == "random" else "timm's side takes ours",
        "changed": "float32, drop path and dropout 0, every token and connection kept, no teacher, nothing frozen",
        "rows": rows,
        "device": device.type,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _compare(step: int, ours: TracedTensor, theirs: TracedTensor) -> tuple[float, Divergence | None]:
    """Largest difference relative to the largest value of timm's tensor; NaN where either holds one."""
    a, b = ours.value.detach(), theirs.value.detach()
    if torch.equal(a, b):
        return 0.0, None
    if a.shape != b.shape:
        text = f"{ours.name} {list(a.shape)} against {list(b.shape)}"
        return float("nan"), Divergence(step, ours.what, text, *[float("nan")] * 4)
    distance = (a.double() - b.double()).abs().flatten()
    worst = int(distance.argmax())
    scale = float(b.double().abs().max()) or 1.0
    relative = float(distance[worst]) / scale
    values = (float(side.flatten()[worst]) for side in (a, b))
    return relative, Divergence(step, ours.what, ours.name, float(distance[worst]), relative, *values)


class _Ours:
    """The recipe as `train` runs it, on one device without an engine."""

    def __init__(self, config: Config, batches: int, device: torch.device):
        self.config, self.batches, self.schedule = config, batches, build_schedule(config)
        wrapped = build_model(config)
        self.wrapped, self.model = wrapped.to(device), wrapped.network
        optim = config.optim.model_copy(update={"fused": bool(config.optim.fused)})  # by default timm's step, on a GPU too
        self.objective, self.optimizer = build_objective(config), build_optimizer(wrapped, optim)
        self.ema = Ema(self.model, config.optim.ema)

    def start(self) -> Iterator[TracedTensor]:
        yield from initial(self.model, self.optimizer)
        for t in schedule_points(self.config.epochs, self.batches):
            set_learning_rate(self.optimizer, self.schedule.lr(self._progress(t)))
            yield from rates(self.optimizer, f"of step {t}")

    def step(self, step: int, batch: Batch) -> Iterator[TracedTensor]:
        config, w = self.config, batch.weights
        self.wrapped.train()
        set_learning_rate(self.optimizer, self.schedule.lr(self._progress(step)))
        yield from rates(self.optimizer, f"of step {step}")
        images = augment_on_device(batch, config.augment)
        yield TracedTensor("images", "before mixing", images)
        rng: Any = LegacyGenerator(np.random.RandomState(seed_of(config.seed, step)))
        mix = sample(config.augment, rng, config.model.image_size)
        images, targets = mix_images(images, mix, w), self.objective.targets(batch.labels, mix, w)
        yield TracedTensor("images", "mixed", images)
        yield TracedTensor("targets", "", targets)
        logits = self.wrapped(images, DENSE).logits
        yield TracedTensor("logits", "", logits)
        loss = (self.objective.losses(logits, targets) * w).sum() / w.sum()
        yield TracedTensor("loss", "mean", loss)
        self.optimizer.zero_grad()
        loss.backward()
        yield from gradients(self.model)
        clip(self.model, config.optim.clip)
        self.optimizer.step()
        yield from parameters("weight", self.model)
        self.ema.update()
        yield from (TracedTensor("average", name, value) for name, value in self.ema.state_dict().items())

    def _progress(self, step: int) -> float:
        return step // self.batches + step % self.batches / self.batches


def _plain(config: Config) -> Config:
    """The same configuration without drop path and dropout, whose masks would come from two generators, and without a teacher and frozen
    parameters, which timm's components do not have. Both sides take the same images, which the workers decode on every host."""
    rates = {name: 0.0 for name in config.model.args if name.endswith(("drop_rate", "drop_path_rate"))}
    plain = config.without_teacher()
    model = {"drop_path": 0.0, "args": {**config.model.args, **rates}}
    return plain.changed(model=model, optim={"freeze": 0}, data={"decode_on": "workers"})


def _whole_pairs(batch: Batch, rows: int, device: torch.device) -> Batch:
    """The first rows of a batch without pairs that contain a broken image or padding: timm's losses have no weights."""
    whole = (batch.weights.view(-1, 2) > 0).all(1).repeat_interleave(2)
    kept = whole.nonzero().flatten()[: rows - rows % 2]
    return Batch(*(value[kept].to(device) for value in batch[:-1]), batch.broken)  # pyright: ignore
