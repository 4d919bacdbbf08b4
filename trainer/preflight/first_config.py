"""`trilevel init DATA`: writes a commented configuration for a data set, with all three levels, and a dense baseline beside it.

The values are rules of thumb from the recipes in configs/ (small networks: quickstart, cifar10; large ones: DeiT's, arXiv 2012.12877);
nothing is measured here. The methods of the levels are named in the text of the file and nowhere else.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from sparsity.settings import RunLength
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.config.run_defaults import OF_OPTIM
from trainer.config.strict_yaml import load_yaml
from trainer.config.values import Duration
from trainer.preflight.data_survey import Survey, survey
from trainer.storage.disk import write_text
from trainer.storage.text import printable

_FEW, _MANY = 20_000, 200_000  # training images below which a small network, above which a large one is written
_LEAST_FOR_SWAPS = 40  # images: of fewer, 5 % is less than two


@dataclass(frozen=True)
class Choices:
    """What depends on the data set and the machine."""

    model: str
    args: str
    blocks: str
    image_size: int
    patch: int
    batch: int
    lanes: int
    epochs: int
    workers: int
    large: bool


def choose(found: Survey, cores: int, devices: int, epochs: int | None = None) -> Choices:
    """Image and patch size by the images' short side, network, batch and epochs (where not given) by their number, workers by the cores
    per device."""
    image_size, patch = next(
        (size, patch)
        for below, size, patch in ((40, 32, 4), (80, 64, 8), (160, 128, 16), (1 << 62, 224, 16))
        if found.side < below
    )
    few, many = found.images < _FEW, found.images >= _MANY
    name = "deit_small_patch16_224" if many and patch == 16 else "deit_tiny_patch16_224"
    args = [f"patch_size: {patch}"] if patch != 16 else []
    args += ["embed_dim: 96", "depth: 6", "num_heads: 3"] if few else []
    batch = 1 << max(1, min(found.images // 100, 1024).bit_length() - 1)
    batch = min(max(batch, 64), 1 << max(1, (found.images // 4).bit_length() - 1))
    return Choices(
        model=name,
        args="{" + ", ".join(args) + "}",
        blocks="[1, 3]" if few else "[3, 6, 9]",
        image_size=image_size,
        patch=patch,
        batch=batch,
        lanes=max(1, min(16, batch // 16)),
        epochs=epochs or (300 if many else 100),
        workers=max(1, min(8, cores // max(devices, 2) - 1)),
        large=many,
    )


def write_configs(folder: str, out: str | None, epochs: int | None = None) -> tuple[Survey, list[Path]]:
    """Look at the shards of a folder and write OUT.yaml and OUT_dense.yaml; both are loaded again. epochs: of the runs; the lengths in the
    files follow. Raises DataError, ConfigError."""
    import torch

    if epochs is not None and epochs < 2:
        raise ConfigError(f"init --epochs {epochs}: must be >= 2, one of them is warm-up")
    found = survey(folder)
    devices = torch.cuda.device_count()
    chosen = choose(found, len(os.sched_getaffinity(0)), devices, epochs)
    path = Path(out or f"{_name(Path(folder).resolve().name)}.yaml")
    if path.suffix != ".yaml":
        raise ConfigError(f"init --out {path}: must end with .yaml")
    dense = path.with_name(f"{path.stem}_dense.yaml")
    for one in (path, dense):
        if one.exists():
            raise ConfigError(f"init: {one} exists; remove it, or write another file with --out FILE.yaml")
    for one in (path, dense):
        try:
            one.parent.mkdir(parents=True, exist_ok=True)
            write_text(one, text(found, chosen, path, dense, dense=one == dense, gpu=devices > 0))
        except OSError as error:
            raise ConfigError(f"init --out {one}: {error.strerror}; choose another path with --out FILE.yaml") from error
        written = load(one).data
        for key, value in (("train", found.train), ("validation", found.validation), ("labels", found.labels)):
            if getattr(written, key) != value:
                raise ConfigError(
                    f"init: {one} reads data.{key}={getattr(written, key)!r}, wanted {value!r}; write data.{key} by hand"
                )
    return found, [path, dense]


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-") or "run"


def text(found: Survey, c: Choices, path: Path, baseline: Path, *, dense: bool, gpu: bool) -> str:
    """The YAML of a run: with the levels, or the dense baseline, which differs in them and the name only."""
    mine = baseline if dense else path
    parts = [_head(found, path, baseline, dense), _network_and_data(found, c, mine), _recipe(c, gpu)]
    parts.append("control: 0  # this run is the dense one: nothing to time beside it\n" if dense else _levels(found, c))
    return "".join(parts)


def _head(found: Survey, path: Path, baseline: Path, dense: bool) -> str:
    what = (
        f"The dense baseline of {path.name}: the same without the sections examples, tokens, connections and plan."
        if dense
        else found.text()
    )
    mine = baseline if dense else path
    lines = [
        what,
        f"Written by `trilevel init {found.source}`: starting values from the recipes of this project, not tuned on these images.",
        f"Check:    trilevel train {mine} --check",
        f"Train:    python -m launch local {mine}      (all GPUs of this machine, or two processes on its CPU)",
        f"Compare:  python -m launch sweep {path} {baseline} --seeds 0,1,2",
    ]
    return "".join(f"# {_one_line(line)}\n" for line in lines)


def _one_line(text: str) -> str:
    """For a comment: no character that ends a line in YAML."""
    return printable(text).replace("\n", " ").replace("\u2028", " ").replace("\u2029", " ")


def _value(text: str) -> str:
    """A text as a value of YAML: as it is where that is read back as this text, else in quotes."""
    try:
        plain = load_yaml(f"key: {text}  # comment\n") == {"key": text}
    except (yaml.YAMLError, ValueError, RecursionError):
        plain = False
    return text if plain else json.dumps(text)


def _network_and_data(found: Survey, c: Choices, mine: Path) -> str:
    labels = "" if found.labels == "cls" else f"  labels: {_value(found.labels)}  # as they were indexed\n"
    args = f"  args: {c.args}\n" if c.args != "{}" else ""
    tokens = (c.image_size // c.patch) ** 2
    return f"""\
name: {_name(mine.stem)}
epochs: {c.epochs}  # from random weights; with model.init=timm a tenth of it is a good start. Other lengths: trilevel init --epochs N
model:
  name: {c.model}  # any VisionTransformer of timm
  classes: {found.classes}
  image_size: {c.image_size}  # the images' short side is {found.side} (median)
{args}\
  # {c.image_size} px in patches of {c.patch}: {tokens} tokens
  # init: timm  # pretrained weights, downloaded; fine-tuning: docs/fine-tuning.md. Remove args then: the weights are of timm's own size
data:
  train: {_value(found.train)}
  validation: {_value(found.validation)}
{labels}\
  batch: {c.batch}  # over all processes; results do not depend on their number
  micro_batch: {min(c.batch, 128)}  # images that a device computes at once; lower it when memory runs out
  workers: {c.workers}  # decoding processes per device; raise it while `data wait` in the report is above a few percent
  lanes: {c.lanes}  # the batch is drawn from so many places of the shards
"""


def _recipe(c: Choices, gpu: bool) -> str:
    if c.large:
        augment = "{policy: rand-m9-mstd0.5-inc1, erasing: 0.25, mixup: 0.8, cutmix: 1.0, smoothing: 0.1}  # DeiT's"
    elif c.image_size <= 64:
        augment = "{crop: src, flip: 0.5, smoothing: 0.1}  # shifted by up to 4 pixels; flip: 0 for digits and text"
    else:
        augment = "{scale: [0.25, 1.0], flip: 0.5, smoothing: 0.1}  # random resized crops; flip: 0 for digits and text"
    precision = (
        "{precision: autocast}  # bf16 compute, float32 parameters"
        if gpu
        else "{precision: float32}  # no GPU here; on GPUs: autocast (bf16 compute, float32 parameters)"
    )
    evaluate = "{every: 1ep, crop_pct: 1.0}" if c.image_size <= 64 else "{every: 1ep}"
    return f"""\
augment: {augment}
optim:
  lr: 1.0e-3  # AdamW; DeiT's 5e-4 x batch / 512 at batch 1024. With model.init: 1.0e-4
  weight_decay: 0.05
  warmup: {Duration(count=OF_OPTIM["warmup"].value(RunLength(c.epochs), {}), unit="ep")}
  clip: 1.0
engine: {precision}
evaluate: {evaluate}
checkpoint: {{every: 1ep}}  # stop with Ctrl-C at any time; --resume continues in the middle of an epoch
"""


def _examples(found: Survey, epochs: int) -> str:
    """Level 1: a score needs three presentations, so an update needs a window of three epochs in front of it and an epoch behind it."""
    window = max(3, epochs // 10)
    updates = min(5, (epochs - 1) // window)
    if found.images < _LEAST_FOR_SWAPS or not updates:
        return f"# examples: all are shown; {found.images} training images in {epochs} epochs are too few to learn which to leave out\n"
    settings = f"method: forgetting, removed: 0.10, swap: 0.05, window: {window}ep, updates: {updates}"
    return f"examples: {{{settings}}}  # the least forgotten images\n"


def _levels(found: Survey, c: Choices) -> str:
    warmup = max(1, c.epochs // 30)
    control = "control: 0.05  # share of the time for timing dense steps; .005, the default, is enough for runs of an hour\n"
    return f"""\
# What training leaves out; --check prints the multiply-adds that remain. Meanings: docs/terms.md
{"" if c.large else control}\
{_examples(found, c.epochs)}\
tokens: {{method: topk, keep: 0.7, blocks: {c.blocks}}}  # the share of the patches that stays after each of these blocks
connections: {{method: shared_keys, keep: 0.5}}  # the share of the keys that attention sees from there on
plan: {{method: cosine, warmup: {warmup}ep, length: {max(1, c.epochs // 3)}ep, plateaus: 4}}  # from everything kept to these shares
"""
