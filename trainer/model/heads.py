"""The number of attention heads of weights and of the network that they are loaded into. It shows in no shape: qkv of 384 x 1152 serves 6
heads as well as 12, with other numbers. What tells: the run that a file is of, the header of our files, or timm's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.config.schema import ModelConfig
from trainer.model.thresholds import header


def refuse_other(model: nn.Module, settings: ModelConfig, source: str, asked: str) -> None:
    """Raises ConfigError where the weights at `source` (a run, a file or "timm") are of a network with another number of heads than
    `model`, which `settings` describes. asked: key or command with its value, for messages. Foreign files tell nothing: they pass."""
    found = (settings.name, {}) if source == "timm" else _network_of(Path(source))
    if found is None or found == (settings.name, settings.args):
        return
    name, args = found
    try:
        with torch.device("meta"):
            theirs = heads(timm.create_model(name, pretrained=False, **args))
    except Exception:  # a name or arguments of another version of timm: unknown, as for foreign files
        return
    ours = heads(model)
    if theirs != ours and len(theirs) == len(ours):
        first = next(number for number, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
        remedy = (
            f"set model.args.num_heads={theirs[0]}" if len(set(theirs)) == 1 else f"use model.name={name} with its arguments"
        )
        raise ConfigError(
            f"{asked}: its network has {theirs[first]} heads in attention {first}, this one {ours[first]}; the shapes are the same, the "
            f"attention is not: {remedy.replace('model.', 'teacher.') if asked.startswith('teacher') else remedy}"
        )


def heads(network: nn.Module) -> list[int]:
    """The number of heads of each attention, in the order of the network."""
    found = (getattr(module, "num_heads", None) for module in network.modules())
    return [number for number in found if isinstance(number, int)]


def _network_of(source: Path) -> tuple[str, dict[str, Any]] | None:
    """timm name and arguments of the network that the weights are of: of the run, or of the file's header."""
    about = header(source) if source.is_file() and source.suffix == ".safetensors" else {}
    if {"model", "args"} <= about.keys():
        return about["model"], json.loads(about["args"])
    for run in (
        source,
        source.parent,
        source.parent.parent.parent,
    ):  # RUN, RUN/weights.safetensors, RUN/checkpoints/STEP/weights...
        if (run / "config.yaml").is_file():
            try:
                model = load_run(run).model
            except ConfigError:  # of another version: its checkpoints name what they need
                return None
            return model.name, model.args
    return None
