"""`trilevel eval`: evaluate one set of weights at one or many keep ratios of tokens (densities), with timm's evaluation transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from torch import Tensor

from sparsity.build import build
from sparsity.cost import cost_with, shape_of
from sparsity.network import SparseNetwork
from sparsity.tokens.scores import ranked
from sparsity.types import DENSE, Plan
from trainer.analysis.evaluation.adaptive_model import adaptive_model, calibrated
from trainer.analysis.evaluation.notes import class_notes, mass_notes, origin_notes
from trainer.analysis.evaluation.passes import AdaptivePasses, ChosenPasses, Passes, RandomPasses
from trainer.analysis.evaluation.precision import Computed
from trainer.analysis.evaluation.scored_model import scored_model
from trainer.analysis.evaluation.teacher_agreement import teacher_of
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.loader.build import validation_set
from trainer.data.loader.dataset import open_indexes
from trainer.data.progress import tracked
from trainer.model.build import build_schedule, cost_of
from trainer.model.evaluate import Scores, evaluate
from trainer.model.origin import origin

MASS, RANDOM, LEAST, TEACHER, OWN = "mass", "random", "least", "teacher", "run's own plan"
COLUMNS = (
    "selection", "keep tokens", "connections", "tokens", "p50", "p95", "GMACs", "top-1", "top-5", "worst", "images", "images/s",
)  # fmt: skip


class DensityResult(NamedTuple):
    """selection: the method of level 2, "mass" or "random". density, connections: keep ratios of tokens (SaiT's densities; for "mass" the
    mean one of the calibration) and of connections at each pruning block. tokens: mean over the images in the block after the last
    selection, with prefix, 0 for a network without tokens; p50, p95: their quantiles. gmacs: 1e9 multiply-adds of a forward pass, mean
    over the images. rate: images/s of the network alone, without the first batch."""

    selection: str
    density: float
    connections: float
    tokens: float
    p50: float
    p95: float
    gmacs: float
    rate: float
    scores: Scores


class DensityResults(NamedTuple):
    """extremes: the images with the fewest and the most tokens of the last adaptive row. notes: below the table."""

    model: str
    rows: list[DensityResult]
    config: Config
    class_names: list[str]
    extremes: AdaptivePasses | None = None
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        table = Table(title=self.model, title_justify="left", caption="\n".join(self.notes) or None, caption_justify="left")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if number else "left")
        for r in self.rows:
            s = r.scores
            shares = [f"{100 * x:.2f} %" for x in (s.top1, s.top5, s.worst_class)]
            tokens = [f"{r.tokens:.4g}", f"{r.p50:g}", f"{r.p95:g}"] if r.tokens else ["-"] * 3
            numbers = [f"{r.density:g}", f"{r.connections:g}", *tokens, f"{r.gmacs:.4g}"]
            table.add_row(r.selection, *numbers, *shares, str(s.images), f"{r.rate:.0f}")
        return table

    def facts(self) -> dict[str, Any]:
        """For --json; top1, top5, images are those of the first row."""
        names = ("top1", "top5", "worst_class", "broken")
        rows = [
            {k: v for k, v in r._asdict().items() if k not in ("scores", "rate")}
            | {"images_per_second": r.rate}
            | {name: getattr(r.scores, name) for name in names}
            for r in self.rows
        ]
        first = self.rows[0].scores
        return {
            "model": self.model,
            "top1": first.top1,
            "top5": first.top5,
            "images": first.images,
            "notes": list(self.notes),
            "rows": rows,
        }


def score(
    model: str,
    config: Config | None,
    densities: list[float] | None = None,
    overrides: list[str] | None = None,
    *,
    adaptive: bool = False,
    random: bool = False,
    least: bool = False,
    teacher: str | None = None,
) -> DensityResults:
    """Evaluate `model` (a run directory, a weights file, or timm:NAME) on `config`'s validation shards, on one device.

    `config` None: the run's own, with `overrides`. densities: keep ratios of tokens, with all connections kept; None: the final plan
    of the configuration. With densities a run directory has one more row, of its own plan, where no density equals it. adaptive: beside
    each density below 1, mass-based selection by its calibrated threshold. random: beside it, as many random tokens. least: as many of
    the lowest importance. teacher: as many by the attention of this network's last block. Raises ConfigError.
    """
    config, network, source = scored_model(model, config, overrides or [], "eval")
    _refuse(network, config, densities, {"--adaptive": adaptive, "--random": random, "--least": least})
    evaluation = Evaluation(config, network)
    passes: list[Passes] = []
    thresholds = ranking = None
    orders: dict[str, Order] = {}
    if adaptive or least or teacher:
        flags = [name for name, on in (("--adaptive", adaptive), ("--least", least), ("--teacher", teacher)) if on]
        try:
            ranking = adaptive_model(config, network)
        except ConfigError as error:
            raise ConfigError(f"eval {' '.join(flags)}: {error}") from error
        orders = _orders(least, teacher_of(teacher, config, network, model) if teacher else None, evaluation.computed)
    if adaptive and ranking is not None:
        thresholds = calibrated(source, config, ranking)
        evaluation.computed.place(ranking)
    own = build_schedule(config).last()
    plans = [Plan(d, 1.0) for d in densities] if densities else [own]
    for plan in plans:
        passes.append(Passes(config.tokens.method, network, plan))
        if plan.keep_tokens < 1.0 and ranking is not None and thresholds is not None:
            passes.append(AdaptivePasses(MASS, ranking, plan, thresholds.mass(plan.keep_tokens)))
        if plan.keep_tokens < 1.0 and random:
            beside = build(network.network, tokens="random", blocks=config.tokens.blocks, position=config.tokens.position)
            beside.residual = network.residual
            passes.append(RandomPasses(RANDOM, beside.eval(), plan))
        if plan.keep_tokens < 1.0 and ranking is not None:
            passes += [ChosenPasses(name, ranking, plan, order) for name, order in orders.items()]
    if source is not None and source.is_dir() and own not in plans:
        passes.append(Passes(OWN, network, own))
    rows = [evaluation.row(one) for one in passes]
    found = [one for one in passes if isinstance(one, AdaptivePasses)]
    notes = [*class_notes(source, evaluation.index), *origin_notes(origin(source), config, network, densities or ())]
    if thresholds is not None:
        means = [(row.density, row.tokens) for row in rows if row.selection == MASS]
        notes += mass_notes(thresholds, evaluation.computed, network, means)
    classes = [str(name) for name in evaluation.index.classes]
    return DensityResults(model, rows, config, classes, found[-1] if found else None, tuple(notes))


Order = Callable[[Tensor, Tensor], Tensor]


def _orders(least: bool, teacher: SparseNetwork | None, computed: Computed) -> dict[str, Order]:
    """Other orders of patches than that of importance, for comparison: see `ChosenPasses`."""
    orders: dict[str, Order] = {}
    if least:
        orders[LEAST] = lambda _, order: order.flip(1)
    if teacher is not None:
        computed.place(teacher)
        orders[TEACHER] = lambda images, _: ranked(_attention(teacher, images))
    return orders


def _attention(teacher: SparseNetwork, images: Tensor) -> Tensor:
    found = teacher(images, DENSE, frozenset({"cls_attention"})).cls_attention
    assert found is not None
    return found


class Evaluation:
    """The validation set of a configuration, and a device that passes run on."""

    def __init__(self, config: Config, network: SparseNetwork):
        self.config, self.network = config, network
        self.computed = Computed.of(config)
        self.computed.place(network)
        _, self.index = open_indexes(config.data)

    def row(self, passes: Passes) -> DensityResult:
        """The scores, tokens, cost and rate of passes over every image."""
        found = validation_set(self.index, self.config, 0, 1)
        title = f"eval, {passes.selection}, keep tokens {passes.plan.keep_tokens:g}"
        batches = passes.watching(tracked(found, title, len(found), "batches"))
        with self.computed.autocast():
            scores = evaluate(
                passes, batches, passes.plan, self.config.model.classes, self.config.augment, self.computed.device
            )
        plan, counts = passes.plan, passes.counts()
        if counts is None or not isinstance(passes, AdaptivePasses):
            cost = cost_of(self.network, plan)
            tokens, gmacs = np.array([self._tokens_left(cost["tokens"])], dtype=float), cost["multiply_adds"] / 1e9
        else:
            shape, (values, images) = shape_of(passes.adaptive.model), np.unique(counts, return_counts=True)
            tokens = counts + float(shape.num_prefix)
            gmacs = float(np.average([cost_with(shape, int(value)).total for value in values], weights=images)) / 1e9
        p50, p95 = (float(np.quantile(tokens, q)) for q in (0.5, 0.95))
        return DensityResult(
            selection=passes.selection, density=plan.keep_tokens, connections=plan.keep_connections, tokens=float(tokens.mean()),
            p50=p50, p95=p95, gmacs=gmacs, rate=passes.rate, scores=scores,
        )  # fmt: skip

    def _tokens_left(self, tokens: list[float]) -> float:
        """Of the block after the last selection: in a hierarchical network all tokens come back where the next stage begins."""
        return tokens[min(max(self.network.blocks, default=-2) + 1, len(tokens) - 1)] if tokens else 0


def _refuse(network: SparseNetwork, config: Config, densities: list[float] | None, flags: dict[str, bool]) -> None:
    tokens, sparse = config.tokens.settings, any(d < 1 for d in densities or ())
    if sparse:
        try:
            _ = network.grid
        except ValueError as error:
            raise ConfigError(f"--densities {densities}: {error}; evaluate it without --densities") from error
    if sparse and tokens.off:
        raise ConfigError(f"--densities {densities}: the configuration does not prune tokens; add tokens.method=topk")
    if sparse and tokens.fixed_by:
        key = tokens.fixed_by.partition("=")[0]
        raise ConfigError(
            f"--densities {densities}: {tokens.fixed_by} removes the same number of tokens at every density; add {key}=0"
        )
    for flag, on in flags.items():
        if on and not sparse:
            raise ConfigError(f"{flag}: needs --densities with a keep ratio below 1, e.g. --densities 1,.7,.5")
