"""`trilevel eval`: evaluate one set of weights at one or many keep ratios of tokens (densities), with timm's evaluation transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import timm
import timm.data
import torch
from rich.table import Table

from sparsity.types import Plan
from trainer.analysis.run_weights import run_weights
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.config.run_config import Config
from trainer.data.loader.build import validation_set
from trainer.data.loader.dataset import open_indexes
from trainer.model import weights
from trainer.model.build import build_model, build_schedule, cost_of
from trainer.model.evaluate import Scores, evaluate


class DensityResult(NamedTuple):
    """density, connections: keep ratios of tokens (SaiT's densities) and of connections at each pruning block. tokens: in the last
    block. gmacs: 1e9 multiply-adds of one image's forward pass."""

    density: float
    connections: float
    tokens: int
    gmacs: float
    scores: Scores


class DensityResults(NamedTuple):
    model: str
    rows: list[DensityResult]

    def table(self) -> Table:
        table = Table(title=self.model, title_justify="left")
        for column in (
            "keep tokens",
            "keep connections",
            "tokens",
            "GMACs",
            "top-1",
            "top-5",
            "worst class",
            "images",
            "images/s",
        ):
            table.add_column(column, justify="right")
        for r in self.rows:
            s = r.scores
            shares = [f"{100 * x:.2f} %" for x in (s.top1, s.top5, s.worst_class)]
            numbers = [f"{r.density:g}", f"{r.connections:g}", str(r.tokens), f"{r.gmacs:.4g}"]
            table.add_row(*numbers, *shares, str(s.images), f"{s.images_per_second:.0f}")
        return table

    def facts(self) -> dict[str, Any]:
        """For --json; top1, top5, images are those of the first row."""
        rows = [
            {
                "density": r.density,
                "connections": r.connections,
                "tokens": r.tokens,
                "gmacs": r.gmacs,
                "images_per_second": r.scores.images_per_second,
                "top1": r.scores.top1,
                "top5": r.scores.top5,
                "worst_class": r.scores.worst_class,
                "broken": r.scores.broken,
            }
            for r in self.rows
        ]
        first = self.rows[0].scores
        return {"model": self.model, "top1": first.top1, "top5": first.top5, "images": first.images, "rows": rows}


def score(
    model: str, config: Config | None, densities: list[float] | None = None, overrides: list[str] | None = None
) -> DensityResults:
    """Evaluate `model` (a run directory, a weights file, or timm:NAME) on `config`'s validation shards, on one device.

    `config` None: the run's own, with `overrides`. densities: keep ratios of tokens, with all connections kept; None: the final plan
    of the configuration. Raises ConfigError.
    """
    config, network = _load(model, config, overrides or [])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    _, index = open_indexes(config.data)
    plans = [Plan(d, 1.0) for d in densities] if densities else [build_schedule(config).last()]
    tokens, sparse = config.tokens.settings, any(d < 1 for d in densities or ())
    if sparse and tokens.off:
        raise ConfigError(f"--densities {densities}: the configuration does not prune tokens; add tokens.method=topk")
    if sparse and tokens.fixed_by:
        key = tokens.fixed_by.partition("=")[0]
        raise ConfigError(
            f"--densities {densities}: {tokens.fixed_by} removes the same number of tokens at every density; add {key}=0"
        )
    rows = []
    half = config.engine.precision != "float32" and device.type == "cuda"
    for plan in plans:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            scores = evaluate(network, validation_set(index, config, 0, 1), plan, config.model.classes, config.augment, device)
        cost = cost_of(network, plan)
        rows.append(
            DensityResult(plan.keep_tokens, plan.keep_connections, cost["tokens"][-1], cost["multiply_adds"] / 1e9, scores)
        )
    return DensityResults(model, rows)


def _refuse_change(text: str) -> None:
    """Weights must fit exactly: a reinitialised head or a resized embedding would be evaluated untrained."""
    raise ConfigError(f"eval: {text}; give the CONFIG these weights were trained with")


def _load(model: str, config: Config | None, overrides: list[str]) -> tuple[Config, Any]:
    if model.startswith("timm:"):
        if config is None:
            raise ConfigError(f"eval {model}: no validation shards given; add a CONFIG with data.validation")
        name = model.removeprefix("timm:")
        config = _as_timm_evaluates(config, name)
        return config, build_model(config)
    path = Path(model)
    if path.is_dir():
        config = config or load_run(path, overrides)
        path = run_weights(path, "eval")
    if config is None:
        raise ConfigError(f"eval {model}: a weights file needs a CONFIG with its model; add one")
    if not path.is_file():
        raise ConfigError(f"eval {model}: no such file; give a run directory, a weights file or timm:NAME")
    network = build_model(config.changed(model={"init": "random"}))
    weights.fit(network.vit, weights.load_weights(path), str(path), warn=_refuse_change)
    return config, network


def _as_timm_evaluates(config: Config, name: str) -> Config:
    """The configuration with a pretrained model's own size, crop, interpolation and normalisation. Raises ConfigError."""
    weights.refuse_unknown(name)
    network = timm.create_model(name, pretrained=False)
    about, classes = timm.data.resolve_model_data_config(network), getattr(network, "num_classes", 0)
    if classes != config.model.classes:
        raise ConfigError(
            f"model.classes={config.model.classes}: timm:{name} has {classes} classes; set model.classes={classes}"
        )
    if about.get("crop_mode", "center") != "center":
        raise ConfigError(f"timm:{name} needs crop_mode={about['crop_mode']} for evaluation; only the centre crop is supported")
    return config.changed(
        model={"name": name, "init": "timm", "image_size": about["input_size"][-1], "args": {}},
        augment={key: about[key] for key in ("interpolation", "mean", "std")},
        evaluate={"crop_pct": about["crop_pct"]},
    )
