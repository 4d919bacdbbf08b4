"""The network that `trilevel eval` and `trilevel calibrate` take: a run directory, a weights file or timm's weights by name."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import timm.data

from sparsity.network import SparseNetwork
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.config.run_config import Config
from trainer.journal.run_weights import run_weights
from trainer.model import heads, importance, stored_form, thresholds, weights
from trainer.model.build import build_model
from trainer.model.stored_form import naming


class ScoredModel(NamedTuple):
    """config: the run's own or the given one. network: on the CPU, with the weights. source: the run directory or file; None: timm."""

    config: Config
    network: SparseNetwork
    source: Path | None


def scored_model(model: str, config: Config | None, overrides: list[str], command: str) -> ScoredModel:
    """`config` None: the run's own, with `overrides`. Raises ConfigError."""
    if model.startswith("timm:"):
        if config is None:
            raise ConfigError(f"{command} {model}: no shards given; add a CONFIG with data.train and data.validation")
        config = _as_timm_evaluates(config, model.removeprefix("timm:"))
        return ScoredModel(config, build_model(config), None)
    if model.endswith(".onnx"):
        raise ConfigError(f"{command} {model}: an ONNX file; give the run it was exported from, or a safetensors file")
    source = path = Path(model)
    if not path.exists():
        raise ConfigError(f"{command} {model}: no such file; give a run directory, a weights file or timm:NAME")
    if path.is_dir():
        config = config or load_run(path, overrides)
        path = run_weights(path, f"{command} {path}")
    if config is None:
        raise ConfigError(
            f"{command} {model}: a weights file names no images; add a CONFIG with its data and model, e.g. runs/NAME/config.yaml"
        )
    state, about = weights.load_weights(path), thresholds.header(path) if path.suffix == ".safetensors" else {}
    with naming(path):  # of `export --compact` and `--blocks`: another mlp_ratio, layers of several sizes, stored blocks
        args = json.loads(about["args"]) if about.get("model") == config.model.name and "args" in about else config.model.args
        vit = weights.create(config.model.model_copy(update={"init": "random", "args": args}))
        stored_form.shrink(vit, about)
        state = stored_form.read(state, about)
    network = build_model(config, vit)  # what it refuses is a setting of `config`, not the file
    heads.refuse_other(network.network, config.model.model_copy(update={"args": args}), str(path), f"{command} {model}")
    weights.fit(network.network, state, str(path), warn=partial(_refuse_change, command))
    config, network = importance.pinned(config, network, importance.stored_with(source, about))
    return ScoredModel(config, network, source)


def _refuse_change(command: str, text: str) -> None:
    """Weights must fit exactly: a reinitialised head or a resized embedding would be evaluated untrained."""
    raise ConfigError(f"{command}: {text}; give the CONFIG these weights were trained with")


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
