"""The adaptive form of a configuration's network: mass-based selection at its pruning block, by calibrated thresholds."""

from __future__ import annotations

from pathlib import Path

from sparsity.adaptive import AdaptiveViT
from sparsity.network import SparseNetwork
from sparsity.tokens import TOKENS
from sparsity.vit import SparseViT
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.model import thresholds
from trainer.model.thresholds import Thresholds, weights_hash


def adaptive_model(config: Config, network: SparseNetwork, execution: str = "packed") -> AdaptiveViT:
    """`network` with mass-based selection by its own score. Raises ConfigError, naming the key, where it cannot have it."""
    try:
        _ = network.grid
    except ValueError as error:
        raise ConfigError(f"{error} by mass; choose a network of {SparseViT.models}") from error
    if not config.tokens.settings.ranks_by_importance:
        ranking = "|".join(name for name, kind in TOKENS.items() if kind.ranks_by_importance)
        raise ConfigError(
            f"tokens.method={config.tokens.method}: mass-based selection ranks tokens by importance; set tokens.method={ranking}"
        )
    if getattr(config.tokens.settings, "fuse", False):
        raise ConfigError("tokens.fuse=true: mass-based selection does not fuse the tokens that leave; set tokens.fuse=false")
    try:
        return AdaptiveViT(network, execution)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def calibrated(source: Path | None, config: Config, adaptive: AdaptiveViT) -> Thresholds:
    """The thresholds of these weights. Raises ConfigError where there are none, or those of other weights, block or score."""
    found = thresholds.read(source) if source is not None else None
    if found is None:
        raise ConfigError(
            f"--adaptive: {source or config.model.name} has no mass thresholds; run trilevel calibrate {source or 'MODEL'} with the same "
            "--density"
        )
    found.refuse_other(weights_hash(adaptive.model.network.state_dict()), adaptive, str(source))
    return found
