"""Pruned weights of a checkpoint for an exported file: as they are (`dense`), cut out (`compact`), or as kept groups with their indices
(`blocks`). Reading: `stored_form`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsity.weights import compact, stored
from sparsity.weights.groups import Block
from sparsity.weights.pruning import Pruning
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.model import weights as networks
from trainer.model.stored_form import BLOCKS, COMPACT, SIZES

_REMEDY = {"compact": "train with weights.groups=units or heads", "blocks": "train with weights.groups=columns or rows"}


def written(
    form: str, config: Config, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], run: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Fields of the header, and the tensors of a file, for the weights of a checkpoint. state: of level 4 in it. Raises ConfigError where a
    run has no such form."""
    if form == "dense":
        return {}, dict(weights)
    level, vit = level_of(config, state, f"export {run} --{form}")
    assert level.kept is not None
    if form == "blocks" and not all(isinstance(site, Block) for site in level.sites):
        raise _without(form, config)
    header = {SIZES: json.dumps(stored.sizes(level))}
    if form == "blocks":
        return _in_blocks(level, weights, header)
    try:
        smaller = compact.cut(level.sites, weights, level.kept)
    except ValueError as error:
        raise _without(form, config) from error
    if setting := compact.changes_tokens(level.sites, config.tokens.settings):
        raise ConfigError(
            f"export {run} --compact with {setting}: a network without the pruned heads would keep other tokens than the run; leave "
            "--compact out, or train with weights.groups=units"
        )
    sizes = compact.sizes_of(level.sites, level.kept)
    ratio = compact.uniform_ratio(vit, sizes)
    if ratio is not None:
        header["args"] = json.dumps(config.model.args | {"mlp_ratio": ratio})
    else:
        header[COMPACT] = json.dumps(sizes)
    return header, dict(weights) | smaller


def level_of(config: Config, state: Mapping[str, Tensor], what: str) -> tuple[Pruning, Any]:
    """Level 4 as a checkpoint has it, and a network of its sizes. what: the command, for messages. Raises ConfigError otherwise."""
    if config.weights.settings.off:
        raise ConfigError(f"{what}: the run pruned no weights (weights.method={config.weights.method}); leave the option out")
    vit = networks.create(config.model.model_copy(update={"init": "random"}))
    level = config.weights.settings.build(vit)
    level.load_state_dict(state)
    if level.kept is None:
        raise ConfigError(
            f"{what}: no group is pruned yet in this checkpoint, or weights.keep=1; choose a later checkpoint, or leave the option "
            "out"
        )
    return level, vit


def _without(form: str, config: Config) -> ConfigError:
    groups = getattr(config.weights.settings, "groups", "")
    other = {"compact": "blocks", "blocks": "compact"}[form]
    return ConfigError(f"export --{form}: weights.groups={groups} has no such form; use --{other}, or {_REMEDY[form]}")


def _in_blocks(
    level: Pruning, weights: Mapping[str, Tensor], header: dict[str, str]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    found, about = dict(weights), {}
    for site in level.sites:
        assert isinstance(site, Block) and level.kept is not None
        parts = stored.packed(site, found.pop(site.weight), level.kept[site.name])
        found |= {f"{site.weight}.{part}": value for part, value in parts.items()}
        about[site.name] = [site.outputs, site.inputs, *site.size, site.axis]
    return header | {BLOCKS: json.dumps(about)}, found
