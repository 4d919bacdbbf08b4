"""`trilevel kept RUN [--epoch E]`: the list of examples an epoch showed, as tables: every kept example, and the keep ratio of each class.

From the run's journal, its kept list and the index of its shards; no checkpoint, no weights.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from sparsity.examples import kept_ids
from sparsity.examples.by_class import keep_rates
from trainer.provenance.recorded_run import RecordedRun, RecordedRunError
from trainer.storage.private_file import regular

SHOWN = 20  # classes of the printed table
COLUMNS = ("label", "class", "examples", "kept", "keep_ratio", "mean_weight")


class Kept(NamedTuple):
    """An epoch's list. ids: (k,) int64, ascending; weights: (k,) float32, of the loss. classes: one dict per class, see COLUMNS."""

    epoch: int
    name: str
    ids: np.ndarray
    weights: np.ndarray
    classes: list[dict[str, Any]]

    def table(self) -> Table:
        lowest = sorted(self.classes, key=lambda row: row["keep_ratio"])[:SHOWN]
        table = Table(
            title=f"epoch {self.epoch}, list {self.name}: {len(self.ids):,} examples; classes with the lowest keep ratio",
            title_justify="left",
        )
        for column in COLUMNS:
            table.add_column(column.replace("_", " "), justify="left" if column == "class" else "right")
        for row in lowest:
            table.add_row(*[f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()])
        return table

    def facts(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "list": self.name, "kept": len(self.ids), "classes": self.classes}


def kept_of(run: RecordedRun, epoch: int | None = None) -> Kept:
    """The list of an epoch, counted from 0 (None: the newest). Raises RecordedRunError for an epoch without steps, KeptError."""
    lists = {stretch.epoch: stretch.kept for stretch in run.segments}
    if not lists:
        raise RecordedRunError(f"{run.directory}: no steps in its journal yet, so no kept list")
    epoch = max(lists) if epoch is None else epoch
    if epoch not in lists:
        raise RecordedRunError(
            f"--epoch {epoch}: {run.directory} has epochs {min(lists)} to {max(lists)} in its journal, counted from 0"
        )
    selection, index = run.selection(lists[epoch]), run.index
    ids = kept_ids(selection, len(index))
    weights = np.ones(len(ids), np.float32) if selection.weight is None else selection.weight[ids]
    labels, keep = np.asarray(index.labels), np.zeros(len(index), dtype=bool)
    keep[ids] = True
    rates, sizes = keep_rates(keep, labels), np.bincount(labels)
    counts = np.bincount(labels[ids], minlength=len(sizes))
    sums = np.bincount(labels[ids], weights=weights, minlength=len(sizes))
    classes = [
        {
            "label": label,
            "class": index.classes[label] if label < len(index.classes) else str(label),
            "examples": int(sizes[label]),
            "kept": int(counts[label]),
            "keep_ratio": float(rates[label]),
            "mean_weight": float(sums[label] / counts[label]) if counts[label] else 0.0,
        }
        for label in np.flatnonzero(sizes).tolist()
    ]
    return Kept(epoch, lists[epoch], ids, weights, classes)


def write(kept: Kept, run: RecordedRun, folder: Path) -> list[Path]:
    """epoch-E-kept.csv (id, key, shard, label, weight of each kept example) and epoch-E-classes.csv; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    index, stem = run.index, f"epoch-{kept.epoch:04d}"
    paths = [folder / f"{stem}-kept.csv", folder / f"{stem}-classes.csv"]
    shards = index.shard_of(kept.ids)
    rows = (
        (number, index.key(number), index.names[shard], int(index.labels[number]), f"{weight:g}")
        for number, shard, weight in zip(kept.ids.tolist(), shards.tolist(), kept.weights.tolist(), strict=True)
    )
    _csv(paths[0], ("id", "key", "shard", "label", "weight"), rows)
    _csv(paths[1], COLUMNS, (row.values() for row in kept.classes))
    return paths


def _csv(path: Path, head: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with open(path, "w", newline="", errors="backslashreplace", opener=regular) as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
