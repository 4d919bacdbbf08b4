"""`trilevel show RUN --weights`: a picture of the weights that level 4 kept, one panel per layer, and their share of each layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from trainer.analysis.plotting import BLUE
from trainer.checkpoint import save_load
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.model.pruned_file import level_of
from trainer.storage.text import plot_text

PIXELS = 192  # of the longer side of a panel: a larger layer is shown as the kept share around each pixel


def show(run: Path | str, out: Path) -> Path:
    """Draw out/weights.png from the newest checkpoint. Raises ConfigError where nothing has been pruned."""
    run = Path(run)
    config = load_run(run)
    checkpoint = save_load.latest(run / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"show {run} --weights: no checkpoint in it; give the directory of a run with one")
    level, _ = level_of(config, save_load.pruning_of(checkpoint), f"show {run} --weights")
    masks = {name: mask for name, mask in level.masks().items() if mask.ndim == 2}
    out.mkdir(parents=True, exist_ok=True)
    return draw(masks, f"{config.name}, {checkpoint.name}: kept weights of each layer (rows: outputs)", out / "weights.png")


def draw(masks: dict[str, Tensor], title: str, path: Path) -> Path:
    """One panel per weight (O, I), a line per transformer block: blue where it is kept, white where it is pruned."""
    rows: dict[str, list[str]] = {}
    for name in masks:
        rows.setdefault(".".join(name.split(".")[:2]), []).append(name)
    widest = max(map(len, rows.values()))
    figure = Figure(figsize=(2.3 * widest, 1.9 * len(rows) + 0.5), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), widest, squeeze=False)
    for line, names in zip(panels, rows.values(), strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, name in zip(line, names, strict=False):
            mask = masks[name]
            axes.imshow(_painted(shares(mask)), interpolation="nearest")
            label = f"{name.removesuffix('.weight')}\n{mask.shape[0]} x {mask.shape[1]}, {float(mask.double().mean()):.0%} kept"
            axes.set_title(plot_text(label), fontsize=7)
    figure.suptitle(plot_text(title), fontsize=9)
    FigureCanvasAgg(figure).print_png(path)
    return path


def shares(mask: Tensor) -> Tensor:
    """The kept share of the elements around each pixel, (rows, columns) in [0, 1], at most PIXELS on a side."""
    wanted = [min(size, PIXELS) for size in mask.shape]
    return F.adaptive_avg_pool2d(mask[None, None].float(), (wanted[0], wanted[1]))[0, 0]


def _painted(shares: Tensor) -> np.ndarray:
    color = torch.tensor([int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (1 - shares[..., None] * (1 - color)).numpy()
