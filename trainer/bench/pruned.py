"""`trilevel bench inference CONFIG|RUN --forms compact,block`: images/s of a pruned network in the forms it has, beside a timm network.

A run's newest checkpoint has accuracies too: top-1 of each form on its validation images, how often its answer is that of torch's dense
network with zeros, and how far its logits are from it. A configuration has random weights. Every token is kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.weights.stored import sizes
from trainer.bench.forms import IN_BF16, ONNX, Pruned, of_config, of_run, reference, refuse, rows
from trainer.bench.inference import COLUMNS, Row, measured
from trainer.bench.result import BenchResult
from trainer.config.run_config import Config
from trainer.data.augment.on_device import normalise
from trainer.data.loader.build import clean_images
from trainer.data.loader.calibration import calibration_images
from trainer.data.loader.dataset import open_indexes
from trainer.data.progress import tracked

RANDOM = 32  # images for the ranges of int8 where the weights are random: times do not depend on them
CALIBRATED = 256  # training images for the ranges of int8 of a run, as in `trilevel export --int8`
WITHOUT_TOP1 = ("bsr",)  # other groups than those of the run are zero
LEFT_OUT = ("images/s", "tokens")  # the table would be too wide; both are in --json
FORM_COLUMNS = {name: text for name, text in COLUMNS.items() if name not in LEFT_OUT} | {"bytes": "{bytes:,}"}
ANSWERS = {"top-1 %": "{top1:.2f}", "same answer %": "{agreement:.2f}", "logits differ": "{difference:.1e}"}


def bench(
    source: Config | Path,
    forms: Sequence[str],
    batches: list[int],
    rounds: int,
    against: str | None = None,
    overrides: Sequence[str] = (),
) -> BenchResult:
    """Measure on this machine's GPU, or else its CPU (float32). source: a configuration, or the directory of a run, with `overrides`.

    against: `timm:NAME`, the network that speedups refer to; None: the dense network of `source` itself. Raises ConfigError for a form that
    the groups do not have, DataError where the images of a run cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse(forms, device)
    pruned = of_config(source) if isinstance(source, Config) else of_run(source, overrides)
    config, answers = pruned.config, {}
    other = None if against is None else reference(against, config)
    half = device.type == "cuda" and config.engine.precision != "float32"
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="trilevel-forms-") as folder:
        table = rows(pruned, forms, device, Path(folder), other, _calibration(pruned, forms))
        if pruned.run is not None:
            answers = _answers(config, pruned.vit.to(device), _answering(table, against), device)
        for batch in batches:
            images = torch.randn(batch, 3, *pruned.vit.patch_embed.img_size, generator=torch.Generator().manual_seed(0)).to(
                device
            )
            timed = measured(table, images, rounds, half, batch)
            found |= {f"{batch} x {name}": facts | answers.get(name, {}) for name, facts in timed.items()}
    columns = FORM_COLUMNS | (ANSWERS if answers else {})
    if all(facts["joules"] is None for facts in found.values()):
        columns.pop("J/image")
    return BenchResult(_title(pruned, half, rounds, device), found, columns, _notes(pruned, found, against))


def _title(pruned: Pruned, half: bool, rounds: int, device: torch.device) -> str:
    s: Any = pruned.config.weights.settings
    model = pruned.config.model
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads, float32"
    block = f", block={list(s.block)}" if s.groups in ("columns", "rows") else ""
    return (
        f"{pruned.run or model.name}, {model.image_size} px, weights.groups={s.groups}{block}, keep={s.keep:g}, eager, "
        f"{'bf16 autocast, ' if half else ''}{rounds} rounds, {kind}"
    )


def _notes(pruned: Pruned, found: Mapping[str, Mapping[str, Any]], against: str | None) -> list[str]:
    left = sizes(pruned.level)
    notes = [
        f"row: batch size x network; timm: {against or 'the dense network'}. bound: speedup if time followed multiply-adds.",
        f"bytes of the pruned layers, float32: dense {left['dense']:,}, blocks {left['block']:,}, CSR {left['csr']:,}.",
    ]
    if any(name.endswith(IN_BF16) for name in found):
        notes.append(
            f"2:4 has bf16 weights, as the row {IN_BF16}; those of timm are float32, and cast in each pass under autocast."
        )
    if any(name.endswith(ONNX) for name in found):
        notes.append("peak of onnxruntime: growth of the process; of torch: its allocations.")
    if all(facts["joules"] is None for facts in found.values()):
        notes.append("energy: not measured; neither NVML nor RAPL (/sys/class/powercap) can be read here.")
    return notes


def _calibration(pruned: Pruned, forms: Sequence[str]) -> Iterable[np.ndarray]:
    """Normalised batches for the ranges of int8."""
    if ONNX[1] not in forms:
        return []
    if pruned.run is None:
        size = pruned.vit.patch_embed.img_size
        images = torch.randn(RANDOM, 3, *size, generator=torch.Generator().manual_seed(1))
        return [part.numpy() for part in images.split(8)]
    index, _ = open_indexes(pruned.config.data)
    drawn = calibration_images(pruned.config, index, CALIBRATED, torch.device("cpu"), "calibrate int8")
    return [batch.numpy() for batch in drawn if len(batch)]


def _answering(table: Mapping[str, Row], against: str | None) -> dict[str, Row]:
    """The rows that have the weights of the run."""
    return {name: row for name, row in table.items() if name not in WITHOUT_TOP1 and (name != "timm" or against is None)}


@torch.inference_mode()
def _answers(config: Config, dense: Any, table: Mapping[str, Row], device: torch.device) -> dict[str, dict[str, float]]:
    """{row: top1 and agreement with the dense network in %, and the largest difference of a logit, relative to the largest logit}, over
    the validation images."""
    right, same, apart = (dict.fromkeys(table, 0.0) for _ in range(3))
    largest = images = 0.0
    for pixels, labels in _labelled(config, device):
        reference = dense(pixels)
        largest, images = max(largest, float(reference.abs().max())), images + len(labels)
        for name, row in table.items():
            logits = row.run(pixels)
            right[name] += int((logits.argmax(1) == labels).sum())
            same[name] += int((logits.argmax(1) == reference.argmax(1)).sum())
            apart[name] = max(apart[name], float((logits - reference).abs().max()))
    return {
        name: {"top1": 100 * right[name] / images, "agreement": 100 * same[name] / images, "difference": apart[name] / largest}
        for name in table
    }


def _labelled(config: Config, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Validation images, normalised, and their labels, broken ones left out."""
    _, index = open_indexes(config.data)
    ids = np.arange(len(index))
    batches = -(-len(ids) // config.evaluate.batch)
    loader = clean_images(index, config, 0, 1, 1.0)
    for batch in tracked(loader.of(ids), "answers of the forms", batches, "batches"):
        counted = batch.weights.to(device) > 0
        yield normalise(batch.images.to(device), config.augment)[counted], batch.labels.to(device)[counted]
