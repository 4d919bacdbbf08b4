"""`trilevel train CONFIG --check`: validate a run before it uses a GPU, and print its plan of keep ratios as a table."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from sparsity.network import SparseNetwork
from sparsity.types import DENSE, single_process
from trainer.checkpoint import save_load
from trainer.config.errors import ConfigError, TrilevelError
from trainer.config.run_config import Config
from trainer.data.errors import DataError
from trainer.data.loader.build import training_stream
from trainer.data.loader.dataset import check_classes, check_labels, open_indexes
from trainer.data.loader.shuffle_quality import Quality, shuffle_quality
from trainer.engine import cuda_graphs
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.model.build import (
    after_pruning,
    build_distillation,
    build_examples,
    build_model,
    build_objective,
    build_pruning,
    build_schedule,
    cost_of,
    refuse_frozen,
)
from trainer.model.optimizer import build_optimizer
from trainer.model.schedule import Stretch
from trainer.model.teacher import build_teacher
from trainer.run.directory import refuse_start
from trainer.run.ineffective import refuse_ineffective, warnings_of
from trainer.telemetry.efficiency import TRAINING


@dataclass(frozen=True)
class Plateau:
    """A part of the run under one plan. tokens: per block, prefix included; multiply_adds: per image."""

    stretch: Stretch
    tokens: list[int]
    multiply_adds: float

    @property
    def epochs(self) -> float:
        """Its length; of a stretch whose steps draw their plan, the share of them."""
        return self.stretch.share * (self.stretch.end - self.stretch.start)


@dataclass(frozen=True)
class CheckReport:
    """What a run will do, from its configuration, its shards and the number of processes."""

    config: Config
    world: int
    images: int
    validation_images: int
    steps: int  # in the first epoch
    micro_batch: int
    accumulation: int
    dense: float  # multiply-adds of an image's forward pass with everything kept
    parameters: int
    plateaus: list[Plateau]
    quality: Quality  # of the first epoch's order, from a sample of its batches
    frozen: int = 0  # of the parameters, do not train
    teacher: float = 0.0  # multiply-adds of an image's forward pass through the teacher
    after_pruning: str = ""  # multiply-adds and bytes that level 4 leaves
    warnings: tuple[str, ...] = ()  # settings with little or no effect, classes without images
    refused: str = ""  # why the run could not start in its directory

    def share(self) -> float:
        """Multiply-adds of the whole run relative to dense = 1, by the token and connection levels alone (same examples)."""
        return sum(p.epochs * p.multiply_adds for p in self.plateaus) / (self.config.epochs * self.dense)

    def teacher_share(self) -> float:
        """Multiply-adds of the teacher as a share of those of a step, mean over the run; the backward pass counts as two forward passes."""
        return self.teacher / (TRAINING * self.share() * self.dense + self.teacher)

    def table(self) -> Table:
        table = Table(title=f"{self.config.name}: plan of the run (keep ratios by epoch)", title_justify="left")
        sides = {"epochs": "left", "keep tokens": "right", "keep connections": "right", "tokens per block": "left"}
        for column, side in sides.items():
            table.add_column(column, justify=side)  # pyright: ignore[reportArgumentType]
        table.add_column("GMACs", justify="right")
        table.add_column("of dense", justify="right")
        for p in self.plateaus:
            table.add_row(
                p.stretch.text,
                f"{p.stretch.plan.keep_tokens:.3f}",
                f"{p.stretch.plan.keep_connections:.3f}",
                _runs(p.tokens),
                f"{p.multiply_adds / 1e9:.4g}",
                f"{p.multiply_adds / self.dense:.3f}",
            )
        return table

    def text(self) -> str:
        c = self.config
        share = c.examples.settings.left_out
        frozen = f" ({self.frozen / 1e6:.2f} M frozen)" if self.frozen else ""
        teacher = (
            f"teacher from {c.teacher.source}: {self.teacher / 1e9:.4g} GMACs per image, {self.teacher_share():.1%} of the multiply-adds "
            "of a step (its forward pass; the model's forward and backward passes count as three)\n"
        )
        weights = f"{c.weights.method} keeps {c.weights.settings.summary}\n" if c.weights.settings.summary else ""
        weights += f"{self.after_pruning}\n" if self.after_pruning else ""
        removed = f"; {c.examples.method} removes {share:.0%} of the examples" if share else ""
        return (
            f"{c.model.name}, {self.parameters / 1e6:.2f} M parameters{frozen}, {c.model.image_size} px, "
            f"{self.dense / 1e9:.4g} GMACs dense\n"
            f"{self.images} training and {self.validation_images} validation images{removed}\n"
            f"{c.epochs} epochs, {self.steps} steps in the first; global batch {c.data.batch} = {self.world} process(es) x "
            f"{self.accumulation} accumulation step(s) x micro-batch {self.micro_batch}{' (last ones padded)' if self.padded() else ''}\n"
            f"{teacher if self.teacher else ''}{weights}"
            f"multiply-adds of the run, without counting removed examples: {self.share():.3f} of dense\n{self.quality.text()}"
            + "".join(f"\nwarning: {text}" for text in self.warnings)
        )

    def padded(self) -> bool:
        return self.world * self.accumulation * self.micro_batch != self.config.data.batch


def check(config: Config, world: int, resume: bool = False) -> CheckReport:
    """Check a configuration together with its shards, its model and `world` processes. resume: as the run will be started; the newest
    checkpoint must then be of this run. Raises ConfigError or DataError."""
    refuse_ineffective(config, resume)
    train, validation = open_indexes(config.data)
    check_classes(train, validation)
    check_labels(validation, config.model.classes)
    model, examples = build_model(config), build_examples(config, train)
    try:
        stream = training_stream(train, config, 0, world)
        order = stream.order(0, examples.select(0, single_process))
    except DataError:
        raise
    except ValueError as error:  # the batch does not fit the number of processes, or the epoch
        raise ConfigError(str(error)) from error
    deepspeed_config(config.engine, stream.batch_split, world, config.optim.clip)  # raises on conflicting settings
    if config.engine.cuda_graphs:
        cuda_graphs.refuse(True, world, stream.batch_split)
    build_objective(config)
    level4 = build_pruning(config, model)
    build_optimizer(model, config.optim)
    refuse_frozen(level4, model)
    teacher = build_teacher(config, model, build_distillation(config).teacher_outputs)
    return CheckReport(
        config=config,
        world=world,
        images=len(train),
        validation_images=len(validation),
        steps=order.steps,
        micro_batch=stream.batch_split.micro_batch,
        accumulation=stream.batch_split.accumulation,
        dense=float(cost_of(model, DENSE)["multiply_adds"]),
        parameters=sum(p.numel() for p in model.parameters()),
        plateaus=_plateaus(config, model),
        quality=shuffle_quality(order, train.labels, batches=16),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        teacher=float(teacher.multiply_adds),
        after_pruning=after_pruning(config, model),
        warnings=tuple(warnings_of(config, model.network, train, validation, world)),
        refused=_refused(config, resume, train.fingerprint, teacher.hash, model),
    )


def _refused(config: Config, resume: bool, fingerprint: str, teacher: str, model: SparseNetwork) -> str:
    """Why the start would be refused once it looks at the run directory; empty where it would not."""
    try:
        refuse_start(config.directory(), resume)
        newest = save_load.latest(config.directory() / "checkpoints") if resume else None
        if newest is not None:
            save_load.compared(newest, config, fingerprint, teacher, model)
    except TrilevelError as error:
        return str(error)
    return ""


def _plateaus(config: Config, model: SparseNetwork) -> list[Plateau]:
    found = []
    for stretch in build_schedule(config).stretches():
        about = cost_of(model, stretch.plan)
        found.append(Plateau(stretch, about["tokens"], float(about["multiply_adds"])))
    return found


def _runs(tokens: list[int]) -> str:
    """[17, 17, 12, 12] -> "17x2 12x2"."""
    text: list[list[int]] = []
    for n in tokens:
        if text and text[-1][0] == n:
            text[-1][1] += 1
        else:
            text.append([n, 1])
    return " ".join(f"{n}x{count}" for n, count in text)
