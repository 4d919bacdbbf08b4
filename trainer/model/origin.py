"""What stored weights were trained with: pixel statistics, densities and selection of tokens, from a run's config.yaml or the header of an
exported file. Other settings give other numbers with the same weights, so commands compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm

from sparsity.network import SparseNetwork
from sparsity.vit import SparseViT
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.config.run_config import Config
from trainer.config.schema import AugmentConfig
from trainer.model import importance, thresholds
from trainer.model.build import build_schedule

PIXELS, DENSITIES = "pixels", "densities"  # keys of the header


class Origin(NamedTuple):
    """mean, std: of the pixels; densities: keep ratios of tokens in training; tokens: the section of the configuration, with the name of
    the score. All are empty where they are unknown."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    tokens: Mapping[str, Any] = {}

    def other_pixels(self, augment: AugmentConfig) -> str:
        """Both statistics where they differ from those of a configuration, else ""."""
        ours, theirs = (augment.mean, augment.std), (self.mean, self.std)
        if not self.mean or all(_near(a, b) for a, b in zip(ours, theirs, strict=True)):
            return ""
        shown = [f"mean {list(mean)} std {list(std)}" for mean, std in (theirs, ours)]
        return f"trained with {shown[0]}, augment has {shown[1]}"

    def other_tokens(self, config: Config, network: SparseNetwork) -> list[tuple[str, Any, Any]]:
        """(key, of the weights, now) of each setting of the selection in which `network` of `config` differs."""
        if not isinstance(network, SparseViT) or not self.tokens or config.tokens.settings.off:
            return []
        score = self.tokens.get(importance.KEY, "default")
        if score == "default":
            score = network.about.default_before()[0]
        pairs = (
            ("blocks", self.tokens.get("blocks"), sorted(network.blocks)),
            (importance.KEY, score, network.importance),
        )
        return [(key, own, now) for key, own, now in pairs if own is not None and own != now]


def header_of(config: Config) -> dict[str, str]:
    """Fields of the header of an exported file, of `densities`: all that a step of the run could have."""
    augment = config.augment
    pixels = {"mean": augment.mean, "std": augment.std, "interpolation": augment.interpolation}
    return {
        PIXELS: json.dumps(pixels | {"crop_pct": config.evaluate.crop_pct}),
        DENSITIES: json.dumps(sorted({stretch.plan.keep_tokens for stretch in build_schedule(config).stretches()})),
    }


def origin(source: Path | None) -> Origin:
    """Of a run directory or a weights file. Raises ConfigError for a header that can't be read."""
    if source is None or not source.exists():
        return Origin()
    about = thresholds.header(source) if source.suffix == ".safetensors" else {}
    if source.is_dir() or not {PIXELS, importance.TOKENS} & about.keys():
        run = source if source.is_dir() else source.parent
        try:
            config = load_run(run)
        except ConfigError:  # not a run's
            return Origin()
        about = header_of(config) | {importance.TOKENS: json.dumps(config.resolved()["tokens"])}
        name = importance.stored_with(source, {})
        about[importance.TOKENS] = json.dumps(json.loads(about[importance.TOKENS]) | ({importance.KEY: name} if name else {}))
    try:
        pixels = json.loads(about.get(PIXELS, "{}"))
        mean, std = ([float(one) for one in pixels.get(key, ())] for key in ("mean", "std"))
        densities = [float(one) for one in json.loads(about.get(DENSITIES, "[]"))]
        tokens = dict(json.loads(about.get(importance.TOKENS, "{}")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: its header does not describe the training ({error}); export it again") from error
    return Origin(tuple(mean), tuple(std), tuple(densities), tokens)


def of_timm(name: str) -> Origin:
    """The pixel statistics of timm's weights by name."""
    about = timm.get_pretrained_cfg(name)
    return Origin(tuple(about.mean), tuple(about.std)) if about else Origin()


def _near(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    return len(ours) == len(theirs) and all(abs(a - b) < 1e-3 for a, b in zip(ours, theirs, strict=True))
