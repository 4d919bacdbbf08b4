"""Settings that cannot act in a run of its length: refused where a mechanism would do nothing at all, else reported by `--check`, at the
start of the run and in its report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sparsity.settings import RunLength
from sparsity.types import DENSE
from sparsity.weights.projection import share_of_blocks
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.config.schema_run import TraceConfig
from trainer.config.values import Duration
from trainer.data.loader.dataset import class_warnings, file_warnings
from trainer.data.shards.index import Index
from trainer.journal.reader import FILE
from trainer.model.batch_norm import depends_on_world
from trainer.model.build import build_schedule
from trainer.model.teacher import teacher_pixels
from trainer.run.dense_baseline import fewest_steps
from trainer.run.unread import plain_text, unread
from trainer.storage.text import listed

ROUNDED = 0.02  # of the groups, more than asked for, above which it is reported
INITIAL = 0.05  # share of the initial weights in their average above which it is reported

DRY_RUN = "; for a dry run set stop_at, which leaves the schedules as they are, in place of epochs"


def refuse_ineffective(config: Config, resume: bool = False) -> None:
    """Raises ConfigError for a mechanism that is on and never acts in this run, and for a key that its settings do not read. A run that was
    started before continues: `resume`, with a journal in its directory (launchers give --resume to new runs too)."""
    if resume and (config.directory() / FILE).exists():
        return
    length = RunLength(config.epochs, config.data.repeats)
    if why := config.examples.settings.never_acts(length):
        raise ConfigError(f"{why} (epochs={config.epochs}{DRY_RUN})")
    if why := config.weights.settings.unused:
        raise ConfigError(why)
    schedule = build_schedule(config)
    wanted = schedule.end != DENSE or config.plan.settings.draws
    if wanted and all(stretch.plan == DENSE for stretch in schedule.stretches()):
        raise ConfigError(
            f"plan.method={config.plan.method}, {config.plan.settings.timetable}: no keep ratio falls below 1 in epochs={config.epochs}; "
            f"shorten the plan, or set plan.method=constant{DRY_RUN}"
        )


def ineffective(config: Config, images: int) -> list[str]:
    """Settings with little or no effect in a run over `images` training images, as sentences with key, value and effect."""
    steps = max(round(build_schedule(config).shown(0) * images) // config.data.batch, 1)  # of an epoch
    length = RunLength(config.epochs, config.data.repeats)
    return [
        *config.examples.settings.acts_in_part(length),
        *_shown(length),
        *_few(config, images),
        *_plan(config, steps),
        *_weights(config),
        *_control(config, steps),
        *_average(config, steps),
        *_rate(config),
        *_intervals(config, steps),
        *unread(config),
    ]


def warnings_of(config: Config, network: nn.Module, train: Index, validation: Index, world: int) -> list[str]:
    """Everything that `--check` and the start of a run on `world` processes warn about, as sentences."""
    return [
        *ineffective(config, len(train)),
        *absent_ranks(config.trace, world),
        *unused_pixels(network),
        *rounded_shares(config, network),
        *depends_on_world(network, config),
        *teacher_pixels(config),
        *class_warnings(train, validation, config.model.classes),
        *file_warnings(config.data, train, validation),
    ]


def absent_ranks(trace: TraceConfig, world: int) -> list[str]:
    """Ranks of `trace.ranks` that a run on `world` processes has not, as a sentence."""
    absent = [rank for rank in trace.ranks if rank >= world]
    if trace.steps is None or not absent:
        return []
    return [
        f"trace.ranks={plain_text(trace.ranks)} with {world} process(es): no trace of rank {listed(absent)}; ranks begin at 0"
    ]


def unused_pixels(vit: nn.Module) -> list[str]:
    """What of an image no patch of a timm VisionTransformer covers, as a sentence with key, value and remedy; [] for nothing."""
    embed = getattr(vit, "patch_embed", None)
    patch, size = (getattr(embed, name, None) for name in ("patch_size", "img_size"))
    if not patch or not size or getattr(embed, "dynamic_img_pad", False) or not (left := size[0] % patch[0]):
        return []
    below = size[0] - left
    return [
        f"model.image_size={size[0]} is not a multiple of the patch size {patch[0]}: {left} rows and columns of pixels are not used; set "
        f"{below} or {below + patch[0]}"
    ]


def _shown(length: RunLength) -> Iterator[str]:
    if length.epochs < length.repeats:
        yield (
            f"data.repeats={length.repeats} with epochs={length.epochs}: only {length.epochs} of {length.repeats} images are ever shown; "
            f"an epoch shows one of {length.repeats}"
        )


def _few(config: Config, images: int) -> Iterator[str]:
    """Of a method that decides in the run how many examples an epoch shows; of the others the start refuses too few."""
    settings, batch = config.examples.settings, config.data.batch
    left = images - int(settings.left_out * images)
    if not settings.shares_known and left < batch:
        yield (
            f"examples.method={config.examples.method} may leave {left:,} of {images:,} images, fewer than data.batch={batch}, and the run "
            "would end there; lower data.batch or examples.removed"
        )


def _plan(config: Config, steps: int) -> Iterator[str]:
    schedule, plan = build_schedule(config), config.plan.settings
    stretches = schedule.stretches()
    for name, level in (("tokens", config.tokens), ("connections", config.connections)):
        if not level.settings.off and all(getattr(stretch.plan, f"keep_{name}") == 1 for stretch in stretches):
            yield f"{name}.method={level.method}: the keep ratio is 1 in the whole run, so all {name} are kept; set {name}.keep below 1"
    if config.tokens.settings.off and config.connections.settings.off and config.plan.method != "constant":
        yield f"plan.method={config.plan.method} has no effect with tokens.method=all and connections.method=all"
    last, end = schedule.last(), schedule.end
    if last != end:
        yield (
            f"{plan.timetable}: at the end of epochs={config.epochs} the keep ratios are tokens {last.keep_tokens:.3g}, connections "
            f"{last.keep_connections:.3g}; the plan ends at {end.keep_tokens:g}, {end.keep_connections:g}"
        )
    shortest = min((stretch.end - stretch.start) * steps for stretch in stretches)
    if shortest < 1:
        yield f"plan: the shortest plateau lasts {shortest:.2g} steps; an epoch has {steps}; set fewer plateaus or a longer plan"


def _weights(config: Config) -> Iterator[str]:
    if why := config.weights.settings.without_effect:
        yield f"weights.method={config.weights.method}: {why}"


def rounded_shares(config: Config, network: nn.Module) -> list[str]:
    """Level 4 with few groups in a block: each block rounds up."""
    settings: Any = config.weights.settings
    sites = settings.build(network).sites
    if not sites or getattr(settings, "per", "") != "block":
        return []
    share, most = share_of_blocks(sites, settings.keep)
    if share < settings.keep + ROUNDED:
        return []
    left = "nothing is pruned" if share == 1 else f"{share:.3g} of them stay"
    return [
        f"weights.keep={settings.keep:g}: at most {most} {settings.groups} per block, rounded up in each, so {left}; set another share, "
        "larger blocks, or weights.per=layer"
    ]


def _control(config: Config, steps: int) -> Iterator[str]:
    stretches = build_schedule(config).stretches()
    needed = fewest_steps(any(stretch.share < 1 for stretch in stretches))
    longest = max((stretch.end - stretch.start) * steps for stretch in stretches)
    if config.control and any(stretch.plan != DENSE for stretch in stretches) and longest < needed:
        yield (
            f"control={config.control:g}: the longest plateau has {longest:.0f} steps, timing dense passes needs {needed}, so there will "
            "be no certified speedup"
        )


def _average(config: Config, steps: int) -> Iterator[str]:
    decay, total = config.optim.ema, config.epochs * steps
    if decay is not None and (left := decay**total) > INITIAL:
        fitting = INITIAL ** (1 / total)
        yield (
            f"optim.ema={decay:g} over {total:,} steps: {left:.0%} of the average is still the initial weights; set optim.ema<="
            f"{fitting:.{max(2, len(str(total)))}g}"
        )


def _rate(config: Config) -> Iterator[str]:
    if (first := config.optim.warmup_lr) > config.optim.lr and config.optim.warmup:
        yield f"optim.warmup_lr={first:g} is above optim.lr={config.optim.lr:g}: the learning rate falls to it; set optim.warmup_lr below"
    if (lowest := config.optim.min_lr) > config.optim.lr:
        yield f"optim.min_lr={lowest:g} is above optim.lr={config.optim.lr:g}: the learning rate rises to it; set optim.min_lr below"


def _intervals(config: Config, steps: int) -> Iterator[str]:
    total = config.epochs * steps

    def beyond(length: Duration) -> bool:
        return length.count > (total if length.unit == "step" else config.epochs)

    run = f"the run ({config.epochs} epochs, about {total:,} steps)"
    for key, every, effect in (
        ("evaluate.every", config.evaluate.every, "one evaluation, at the end"),
        ("checkpoint.every", config.checkpoint.every, "one checkpoint, at the end; a run that is killed starts over"),
        ("checkpoint.keep_every", config.checkpoint.keep_every, "it keeps nothing"),
    ):
        if beyond(every):
            yield f"{key}={every} is longer than {run}: {effect}"
    if config.stop_at is not None and not config.stop_at.count:
        yield f"stop_at={config.stop_at}: the run ends before its first step"
    if config.stop_at is not None and beyond(config.stop_at):
        yield f"stop_at={config.stop_at} is behind the end of {run}: it has no effect"
    if config.trace.steps is not None and config.trace.steps[0] > total:
        yield f"trace.steps={list(config.trace.steps)} begins behind the end of {run}: no trace"
