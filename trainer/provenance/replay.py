"""`trilevel replay RUN --step S`: rebuild one global batch of a run as given to the model, from configuration, index and kept list.

Rows, keys and pixels come from the loader's own code; flip, normalisation, erasing and mixing from the device's own code (here on
the CPU); images are denormalised for viewing. Needs no checkpoint and no process group.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from rich.table import Table
from torch import Tensor

from trainer.config.schema import AugmentConfig
from trainer.data.augment.mixup import Mix, draw_mix, mix_images, shares
from trainer.data.augment.on_device import augment_on_device
from trainer.data.batch import Batch
from trainer.data.loader.batch_maker import BatchMaker
from trainer.data.loader.build import batch_maker
from trainer.model.build import build_schedule
from trainer.provenance.hash_chain import digest, extend
from trainer.provenance.recorded_run import RecordedRun
from trainer.storage.disk import atomic_write, write_text
from trainer.storage.private_file import regular

ACROSS, SHEET = 16, 256  # images per row and per contact sheet
SHOWN = 24  # rows of the printed table
_PART = 64  # rows finished at a time, so that a batch of 4,096 fits a laptop


@dataclass(frozen=True)
class Replayed:
    """A global batch of b rows. batch: what the host made. images: (b, 3, S, S) uint8, as given to the model, denormalised.

    rows: one dict per row; facts: of the step. confirmed: whether the journal's hash chain confirms this batch (None if it has no
    step line at or after the step).
    """

    batch: Batch
    images: Tensor
    rows: list[dict[str, Any]]
    facts: dict[str, Any]
    confirmed: bool | None

    def table(self) -> Table:
        table = Table(title=self.facts["title"], title_justify="left")
        names = ("row", "id", "key", "label", "weight", "flip", "erase", "crop", "partner", "own_share")
        for name in names:
            table.add_column(name.replace("_", " "), justify="left" if name in ("key", "label") else "right")
        for row in self.rows[:SHOWN]:
            table.add_row(*[_text(row[name]) for name in names])
        return table

    def text(self) -> str:
        more = f"the first {SHOWN} of {len(self.rows)} rows\n" if len(self.rows) > SHOWN else ""
        checks = {
            True: "the journal's hash chain confirms this batch",
            None: "not checked: no step line at or after this step in the journal",
        }
        broken = [f"broken: {number}: {reason}\n" for number, reason in self.batch.broken]
        if self.facts["skipped"]:
            broken.append("this step was skipped: its loss or gradient was not finite\n")
        if self.facts["decode_on"] == "device":
            broken.append(
                "data.decode_on=device: the run decoded most images on its GPU; these are decoded by the CPU and can differ slightly\n"
            )
        mismatch = "this batch DIFFERS from the journal's hash chain: run `trilevel audit`"
        return more + "".join(broken) + checks.get(self.confirmed, mismatch)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def replay(run: RecordedRun, step: int) -> Replayed:
    """Rebuild the batch of a step, numbered as in the journal. Raises RecordedRunError, KeptError or DataError."""
    config, stretch = run.config, run.segment(step)
    rows, order, selection = run.rows(stretch, step), run.order(stretch), run.selection(stretch.kept)
    maker = batch_maker(run.index, config, train=True)
    batch = maker.batch(stretch.epoch, rows, len(rows.ids))
    if selection.weight is not None:
        batch = batch._replace(weights=batch.weights * torch.from_numpy(selection.weight)[batch.ids])
    mix = draw_mix(config.augment, config.seed, step - 1, config.model.image_size)
    number = stretch.batch + step - stretch.first - 1
    progress = stretch.epoch + number / order.steps
    schedule = build_schedule(config)
    plan = schedule.plans(progress).draw(config.seed, step - 1)
    facts = {
        "title": f"{run.directory} step {step}: epoch {stretch.epoch}, batch {number} of {order.steps}",
        "step": step, "epoch": stretch.epoch, "batch": number, "batches": order.steps, "attempt": stretch.attempt,
        "progress": progress, "lr": schedule.lr(progress), "keep_tokens": plan.keep_tokens,
        "keep_connections": plan.keep_connections, "mix": {"lam": mix.lam, "box": mix.box}, "policy": config.augment.policy,
        "decode_on": config.data.decode_on, "skipped": run.skipped.get(step), "kept_list": stretch.kept, "kept": selection.num_kept,
        "broken": [list(one) for one in batch.broken],
    }  # fmt: skip
    confirmed = _confirmed(run, step, batch)
    return Replayed(
        batch, _seen(batch, mix, config.augment), _rows(run, maker, batch, mix), facts | {"confirmed": confirmed}, confirmed
    )


def _seen(batch: Batch, mix: Mix, augment: AugmentConfig) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (augment.mean, augment.std))
    found = []
    for start in range(0, len(batch.ids), _PART):  # even: pairs stay together
        part = Batch(*[field[start : start + _PART] for field in batch[:-1]], broken=[])
        images = mix_images(augment_on_device(part, augment), mix, part.weights)
        found.append(((images * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(found)


def _rows(run: RecordedRun, maker: BatchMaker, batch: Batch, mix: Mix) -> list[dict[str, Any]]:
    index, own = run.index, shares(mix, batch.weights)[0].tolist()
    broken = dict(batch.broken)
    boxes = maker.boxes(batch.ids.numpy(), batch.rng_keys.numpy())
    found = []
    for row, number in enumerate(batch.ids.tolist()):
        label = int(batch.labels[row])
        found.append({
            "row": row, "id": number, "key": index.key(number), "shard": index.names[int(index.shard_of(number))],
            "label": label, "class": index.classes[label] if label < len(index.classes) else str(label),
            "copy": int(batch.copies[row]), "weight": float(batch.weights[row]), "flip": bool(batch.flip[row]),
            "erase": batch.erase[row].tolist(), "crop": boxes[row], "draw": f"{int(batch.rng_keys[row]) & (1 << 64) - 1:016x}",
            "partner": row ^ 1, "own_share": own[row], "broken": broken.get(number),
        })  # fmt: skip
    return found


def _confirmed(run: RecordedRun, step: int, batch: Batch) -> bool | None:
    """Whether the chain agrees with the step line at or after the step, if this batch is part of it."""
    before = max((mark for mark in run.logged_steps if mark.step < step), default=None)
    mark = min((mark for mark in run.logged_steps if mark.step >= step), default=None)
    if mark is None:
        return None
    head, first = (before.chain, before.step) if before else ("", 0)
    for at in range(first + 1, mark.step + 1):
        stretch = run.segment(at)
        rows = run.rows(stretch, at)
        ids, keys, weights = rows.ids, run.keys(stretch, rows), ~np.isin(rows.ids, list(mark.broken)) * 1.0
        if at == step:
            ids, keys, weights = batch.ids.numpy(), batch.rng_keys.numpy(), batch.weights.numpy()
        head = extend(head, digest(ids, keys, weights))
    return head == mark.chain


def write(replayed: Replayed, folder: Path) -> list[Path]:
    """Write batch.json (facts and rows), rows.csv, images.npz (ids and images, uint8) and contact sheets; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "batch.json", folder / "rows.csv", folder / "images.npz"]
    write_text(paths[0], json.dumps(replayed.facts | {"rows": replayed.rows}, indent=1) + "\n")
    with open(paths[1], "w", newline="", errors="backslashreplace", opener=regular) as file:
        table = csv.DictWriter(file, replayed.rows[0].keys())
        table.writeheader()
        table.writerows(replayed.rows)
    with atomic_write(paths[2]) as file:
        np.savez(file, ids=replayed.batch.ids.numpy(), images=replayed.images.numpy())
    for start in range(0, len(replayed.images), SHEET):
        paths.append(folder / f"sheet-{start // SHEET:02d}.png")
        with atomic_write(paths[-1]) as file:
            _sheet(replayed.images[start : start + SHEET]).save(file, "PNG")
    return paths


def _sheet(images: Tensor) -> PIL.Image.Image:
    """(b, 3, S, S) -> one image, rows of the batch in reading order, mixing partners side by side."""
    b, _, side, _ = images.shape
    cell = side + 2
    sheet = torch.full((-(-b // ACROSS) * cell, min(b, ACROSS) * cell, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // ACROSS * cell, i % ACROSS * cell
        sheet[top : top + side, left : left + side] = image.permute(1, 2, 0)
    return PIL.Image.fromarray(sheet.numpy())
