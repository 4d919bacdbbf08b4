"""The contact sheet of `trilevel show`: the most and the least forgotten examples of a run, and some that were never right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsity.examples.forgetting import Forgetting
from trainer.checkpoint import save_load
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.data.augment.transform import Transform
from trainer.data.loader.dataset import open_indexes
from trainer.data.shards.reader import Reader
from trainer.model.build import build_examples
from trainer.storage.text import plot_text

SHEET = 12  # pictures in a row


def contact_sheet(run: Path, path: Path, overrides: Sequence[str] = ()) -> Path:
    """Draw the most and the least forgotten examples of the current window, and some that were never right, from the newest checkpoint.

    Raises ConfigError without a checkpoint, DataError without the shards.
    """
    config = load_run(run, overrides)
    found = save_load.latest(run / "checkpoints")
    if found is None:
        raise ConfigError(f"show {run}: no checkpoint, which has the statistics of examples; wait for the first one")
    index, _ = open_indexes(config.data, verify=False)
    level: Any = build_examples(config, index)
    level.load_state_dict(save_load.statistics_of(save_load.arrays_of(found)))
    rows = ranked(level)
    figure = Figure(figsize=(1.1 * SHEET, 1.55 * max(len(rows), 1) + 0.6), dpi=130, layout="constrained")
    if not rows:
        figure.text(0.5, 0.4, "no example was shown three times yet since the last update", ha="center")
    transform = Transform(config.augment, config.model.image_size, train=False, crop_pct=config.evaluate.crop_pct)
    reader = Reader(index)
    panels = np.atleast_2d(figure.subplots(len(rows), SHEET)) if rows else np.empty((0, SHEET), dtype=object)
    for line, (name, ids) in zip(panels, rows.items(), strict=True):
        for axes in line:
            axes.set_axis_off()
        line[0].text(0, 1.34, name, transform=line[0].transAxes, fontsize=10, fontweight="bold").set_in_layout(False)
        for axes, number, data in zip(line, ids, reader.read(ids), strict=False):
            if not isinstance(data, Exception):
                axes.imshow(transform(data).pixels.permute(1, 2, 0).numpy())
            label = int(index.labels[number])
            about = (
                f"{level.events[number]}/{max(int(level.seen[number]) - 1, 1)}"
                if name != "never right"
                else f"0/{level.seen[number]}"
            )
            name_of = index.classes[label] if label < len(index.classes) else str(label)
            axes.set_title(f"{plot_text(name_of[:14])}  {about}", fontsize=7)
    note = "times forgotten / chances; never right: times right / presentations"
    figure.suptitle(f"{plot_text(run.name)}, {found.name}: {note}\n", x=0.01, ha="left", fontsize=10)
    FigureCanvasAgg(figure).print_png(path)
    return path


def ranked(level: Forgetting) -> dict[str, np.ndarray]:
    """Up to a row of ids of each kind, in the order in which an update would move them to the pool; empty kinds are left out."""
    scores = level.scores()
    scored, never = np.flatnonzero(np.isfinite(scores)), np.flatnonzero(np.isinf(scores))
    ties = level.spread[scored] / level.seen[scored] if level.wants_spread else np.zeros(len(scored))
    rising = scored[np.lexsort((scored, ties, scores[scored]))]
    rows = {"most forgotten": rising[::-1][:SHEET], "least forgotten": rising[:SHEET], "never right": never[:SHEET]}
    return {name: ids for name, ids in rows.items() if len(ids)}
