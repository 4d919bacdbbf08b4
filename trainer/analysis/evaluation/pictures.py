"""Pictures of `trilevel eval --densities`: accuracy against the measured rate, and the images with the fewest and the most tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.analysis.evaluation.densities import MASS, OWN, RANDOM, DensityResults
from trainer.analysis.evaluation.passes import Extreme
from trainer.analysis.plotting import BLUE, GREY, ORANGE, plain
from trainer.config.schema import AugmentConfig
from trainer.storage.text import plot_text

FADED = 0.82  # grey level that dropped patches fade to


def write(found: DensityResults, folder: Path) -> list[Path]:
    """densities.png and, with an adaptive row, images.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [plot(found, folder / "densities.png")]
    return [*paths, sheet(found, folder / "images.png")] if found.extremes else paths


def plot(found: DensityResults, path: Path) -> Path:
    """Top-1 against images/s of the network, one line per selection, each point with its density."""
    figure = Figure(figsize=(7.0, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    dense = [row for row in found.rows if row.density == 1.0 and row.selection != OWN]
    for selection, color in {found.rows[0].selection: BLUE, MASS: ORANGE, RANDOM: GREY}.items():
        rows = sorted((r for r in found.rows if r.selection == selection and r.density < 1.0), key=lambda r: -r.density)
        rows = [*dense, *rows] if rows else []
        if not rows:
            continue
        rates, top1 = [r.rate for r in rows], [100 * r.scores.top1 for r in rows]
        axes.plot(rates, top1, "o-", color=color, linewidth=1.6, markersize=5, label=selection)
        for row, x, y in zip(rows, rates, top1, strict=True):
            axes.annotate(f"{row.density:g}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, color=color)
    axes.set_xlabel("images/s of the network, measured in this evaluation")
    axes.set_ylabel("top-1, %")
    axes.set_title(plot_text(f"{found.model}: one set of weights, labels are densities"), loc="left", fontsize=10)
    axes.legend(frameon=False)
    plain(axes)
    FigureCanvasAgg(figure).print_png(path)
    return path


def sheet(found: DensityResults, path: Path) -> Path:
    """Upper row: the images with the fewest tokens; lower row: those with the most; dropped patches are faded."""
    assert found.extremes is not None
    augment, names = found.config.augment, found.class_names
    rows = (found.extremes.fewest, found.extremes.most)
    down, across = found.extremes.network.grid
    figure = Figure(figsize=(1.5 * max(map(len, rows)), 3.9), dpi=130, layout="constrained")
    panels = figure.subplots(2, max(map(len, rows)), squeeze=False)
    for line, extremes in zip(panels, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, one in zip(line, extremes, strict=False):
            axes.imshow(_faded(one, (down, across), augment), interpolation="nearest")
            label, predicted = (names[n] if n < len(names) else str(n) for n in (one.label, one.predicted))
            text = label if label == predicted else f"{label}, predicted {predicted}"
            axes.set_title(plot_text(f"{one.count} of {down * across}\n{text}"), fontsize=7)
    density = found.extremes.plan.keep_tokens
    figure.suptitle(
        plot_text(f"{found.model}: fewest and most tokens at mean density {density:g}"), x=0.01, ha="left", fontsize=10
    )
    FigureCanvasAgg(figure).print_png(path)
    return path


def _faded(one: Extreme, grid: tuple[int, int], augment: AugmentConfig) -> np.ndarray:
    """The image as (S, S, 3) in [0, 1], its dropped patches faded."""
    mean, std = (np.array(values)[:, None, None] for values in (augment.mean, augment.std))
    pixels = np.clip(one.pixels * std + mean, 0, 1).transpose(1, 2, 0)
    kept = np.zeros(grid[0] * grid[1], dtype=bool)
    kept[one.kept] = True
    high, wide = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    whole = kept.reshape(grid).repeat(high, 0).repeat(wide, 1)[..., None]
    return np.where(whole, pixels, FADED + 0.12 * (pixels - FADED))
