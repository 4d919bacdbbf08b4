"""`trilevel calibrate`: the mass thresholds of a set of weights for wanted mean densities, from training images (SaiT)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from sparsity.adaptive import AdaptiveViT
from sparsity.tokens import mass as by_mass
from trainer.analysis.evaluation.adaptive_model import adaptive_model
from trainer.analysis.evaluation.precision import Computed
from trainer.analysis.evaluation.scored_model import scored_model
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.loader.calibration import calibration_images
from trainer.data.loader.dataset import open_indexes
from trainer.data.shards.index import Index
from trainer.model import thresholds
from trainer.model.origin import origin
from trainer.model.thresholds import Thresholds
from trainer.model.weights import load_weights, save_weights

FEW = 256  # images below which a mean density of the calibration says little about other images


class Calibrated(NamedTuple):
    """found: all thresholds of the model now. path: where they are kept. densities: those of this call. notes: below the table."""

    found: Thresholds
    path: Path
    densities: list[float]
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        title = (
            f"{self.path}: mass thresholds from {self.found.images} training images, pruning block {self.found.block}, importance "
            f"{self.found.importance}, {self.found.precision}"
        )
        table = Table(title=title, title_justify="left", caption="\n".join(self.notes) or None, caption_justify="left")
        for column in ("density", "mass", "mean density kept"):
            table.add_column(column, justify="right")
        for density in self.densities:
            mass, kept = self.found.by_density[density]
            table.add_row(f"{density:g}", f"{mass:.9g}", f"{kept:.4f}")
        return table

    def facts(self) -> dict[str, object]:
        """For --json."""
        table = self.found.by_density
        rows = [{"density": one, "mass": table[one].mass, "mean_density": table[one].density} for one in self.densities]
        about = {"images": self.found.images, "block": self.found.block, "importance": self.found.importance}
        return {"path": str(self.path), **about, "precision": self.found.precision, "notes": list(self.notes), "rows": rows}


def calibrate(
    model: str, config: Config | None, densities: list[float], images: int = 5000, overrides: list[str] | None = None
) -> Calibrated:
    """Find and keep the thresholds of a run directory or a weights file (.safetensors), whose header is rewritten.

    images: training images, drawn by seed, under the evaluation transform; never validation images. Raises ConfigError.
    """
    config, network, source = scored_model(model, config, overrides or [], "calibrate")
    if source is None or not (source.is_dir() or source.suffix == ".safetensors"):
        raise ConfigError(f"calibrate {model}: give a run directory or a .safetensors file, which keep the thresholds")
    adaptive = adaptive_model(config, network)
    before = thresholds.read(source)
    _refuse_other(source, config, adaptive)
    computed = Computed.of(config)
    computed.place(adaptive)
    height, width = network.grid
    index, validation = open_indexes(config.data)
    try:
        for density in densities:  # before the pass over the images
            by_mass.refuse_density(density, height * width, adaptive.least)
    except ValueError as error:
        raise ConfigError(f"calibrate --density: {error}") from error
    masses = _masses(config, index, adaptive, images, computed)
    try:
        found = {density: by_mass.threshold_for(masses, density, adaptive.least) for density in densities}
    except ValueError as error:
        raise ConfigError(f"calibrate --density: {error}") from error
    digest = thresholds.weights_hash(network.network.state_dict())
    score = adaptive.model.importance
    ours = Thresholds(digest, adaptive.block, score, adaptive.least, len(masses), found, computed.name)
    if before is not None and replace(before, by_density=found, images=ours.images) == ours:  # of the same weights
        if before.images != ours.images and set(before.by_density) - set(found):
            there = ", ".join(map(repr, sorted(before.by_density)))
            raise ConfigError(
                f"calibrate {model}: densities {there} were calibrated with {before.images} images, now {ours.images}; give --images "
                f"{before.images}, or these densities again: --density {there.replace(' ', '')}"
            )
        ours = replace(ours, by_density={**before.by_density, **found})
    notes = _notes(len(masses), len(index), index.fingerprint == validation.fingerprint)
    return Calibrated(ours, _keep(source, ours), densities, notes)


def _notes(images: int, there: int, validated: bool) -> tuple[str, ...]:
    """images: of the calibration. there: of the training set. validated: whether those are the validation images."""
    found = []
    if images < FEW:
        remedy = f"give --images {FEW} or more" if there >= FEW else f"data.train has {there}"
        found.append(f"{images} images are few: other images may keep another mean density; {remedy}")
    if validated:
        found.append("data.train has the same shards as data.validation: eval --adaptive scores the images of the calibration")
    return tuple(found)


def _refuse_other(source: Path, config: Config, adaptive: AdaptiveViT) -> None:
    """Raises ConfigError where the weights were trained with other pixels, or the file's own header selects at another block or by another
    score: it would refuse the thresholds."""
    own = origin(source)
    if different := own.other_pixels(config.augment):
        raise ConfigError(
            f"calibrate {source}: its weights were {different}; leave out augment.mean and augment.std, or set theirs"
        )
    for key, theirs, now in () if source.is_dir() else own.other_tokens(config, adaptive.model):
        raise ConfigError(
            f"calibrate {source}: its header has tokens.{key}={theirs}, the configuration {now}; leave out tokens.{key}"
        )


@torch.no_grad()
def _masses(config: Config, index: Index, adaptive: AdaptiveViT, images: int, computed: Computed) -> torch.Tensor:
    """Cumulated importance of training images, (N, n) float64 on the CPU."""
    pixels = calibration_images(config, index, images, computed.device, "calibrate")
    with computed.autocast():
        return torch.cat([adaptive.ranked(batch)[1].mass.cpu() for batch in pixels])


def _keep(source: Path, ours: Thresholds) -> Path:
    if source.is_dir():
        return thresholds.write_to_run(source, ours)
    header = thresholds.header(source) | {thresholds.HEADER: ours.to_json()}
    save_weights(source, load_weights(source), header)
    return source
