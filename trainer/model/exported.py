"""An exported weights file as a network that answers at any density, from its header (`trilevel export`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsity import build
from sparsity.adaptive import AdaptiveViT
from sparsity.network import SparseNetwork
from sparsity.settings import TokenSettings
from sparsity.types import Plan
from sparsity.vit import SparseViT
from trainer.config.errors import ConfigError
from trainer.config.schema import ModelConfig
from trainer.config.schema_levels import TokensConfig
from trainer.model import stored_form, thresholds, weights
from trainer.model.importance import TOKENS
from trainer.model.origin import origin
from trainer.model.stored_form import naming
from trainer.model.thresholds import Thresholds, weights_hash


class AnyDensity(nn.Module):
    """model: the network with its token reduction. thresholds: of mass-based selection, None without. image_size: side in pixels. source:
    the file, for messages. origin: pixel statistics and densities of its training."""

    def __init__(
        self, model: SparseNetwork, tokens: TokensConfig, thresholds: Thresholds | None, image_size: int, source: str
    ) -> None:
        super().__init__()
        self.model, self.tokens, self.thresholds, self.image_size = model, tokens, thresholds, image_size
        self.source, self.origin = source, origin(Path(source))
        self._adaptive: AdaptiveViT | None = None
        self._refused = ""  # why the thresholds are not of this network
        if thresholds is not None:
            self._adaptive = AdaptiveViT(model, least=thresholds.least)
            try:
                thresholds.refuse_other(weights_hash(model.network.state_dict()), self._adaptive, source)
            except ConfigError as error:  # dense and at a fixed density it can be used all the same
                self._refused = str(error)

    @torch.no_grad()
    def forward(self, images: Tensor, density: float = 1.0, adaptive: bool = False) -> Tensor:
        """Normalised images (B, 3, S, S) float -> logits (B, classes), with the share `density` of the tokens at each pruning block, in
        (0, 1]. adaptive: a mean share; each image has its own number of tokens. Raises ConfigError for a density that is not there, and
        for images that the network cannot take."""
        if not torch.compiler.is_compiling():
            self._refuse(images)
        self.refuse_density(density)
        if adaptive:
            if self._refused:
                raise ConfigError(self._refused)
            if self._adaptive is None or self.thresholds is None:
                raise ConfigError(
                    f"adaptive=True: {self.source} has no mass thresholds; run trilevel calibrate on it, or export the run again after "
                    "its calibration"
                )
            return self._adaptive(images, self.thresholds.mass(density)).logits
        return self.model(images, Plan(keep_tokens=density)).logits

    def refuse_density(self, density: float) -> None:
        """Raises ConfigError for a density that is not there."""
        if isinstance(density, bool) or not isinstance(density, (int, float)):
            raise ConfigError(f"density={density!r}: must be a number in (0, 1]")
        if not 0.0 < density <= 1.0:
            raise ConfigError(f"density={density:g}: must be in (0, 1]")
        if density < 1.0 and (self.tokens.settings.off or self.tokens.settings.fixed_by):
            raise ConfigError(
                f"{self.source}: density={density:g} with tokens.method={self.tokens.method}, which has no density; take density 1, or a "
                "run with topk"
            )

    def _refuse(self, images: Tensor) -> None:
        """Raises ConfigError for images of another shape or type than those of the network."""
        embed = getattr(self.model.network, "patch_embed", None)
        size, kernel = getattr(embed, "img_size", None), getattr(getattr(embed, "proj", None), "weight", None)
        shape = tuple(images.shape)
        if size is None or kernel is None or getattr(self.model.network, "dynamic_img_size", False):
            return  # a convolutional network takes any size
        wanted = (kernel.shape[1], *size)
        if len(shape) != 4 or shape[1:] != wanted:
            raise ConfigError(f"{self.source}: images of shape {list(shape)}: must be (B, {', '.join(map(str, wanted))})")
        if images.dtype != kernel.dtype and not torch.is_autocast_enabled(images.device.type):
            raise ConfigError(
                f"{self.source}: images of {images.dtype}: must be {kernel.dtype} as the weights; convert with images.to"
            )


def load_exported(path: str | Path) -> AnyDensity:
    """The network of a file of `trilevel export`, in evaluation mode. Raises ConfigError for a file without its header."""
    path = Path(path)
    state, about = weights.load_weights(path), _header(path)
    with naming(path):
        tokens = TokensConfig.model_validate(json.loads(about[TOKENS]))
        vit = _network(about)
        stored_form.shrink(vit, about)
        state = stored_form.read(state, about)
        model = _built(vit, tokens, tokens.settings, about)
        if isinstance(model, SparseViT) and getattr(tokens.settings, "importance", "") == "default":
            selection = model.about.default_before()[0]  # the file is older than names of scores in headers
            model = _built(vit, tokens, replace(tokens.settings, importance=selection), about)
    weights.fit(vit, state, str(path), warn=_refuse_change)
    return AnyDensity(model.eval(), tokens, thresholds.read(path), int(about["image_size"]), str(path)).eval()


def _built(vit: nn.Module, tokens: TokensConfig, settings: TokenSettings, about: Mapping[str, str]) -> SparseNetwork:
    return build.build(
        vit, tokens=settings, blocks=tokens.blocks, position=tokens.position, image_size=int(about["image_size"])
    )


def load_plain(path: str | Path) -> nn.Module:
    """The plain timm model of a file of `trilevel export`, in evaluation mode. Raises ConfigError for a file without its header and for
    one that timm cannot build: layers of several sizes, blocks."""
    path = Path(path)
    state, about = weights.load_weights(path), _header(path)
    if form := next((form for form in (stored_form.COMPACT, stored_form.BLOCKS) if form in about), ""):
        raise ConfigError(f"{path}: written by export --{form}, plain timm cannot build it; load it with trainer.load_model")
    with naming(path):
        vit = _network(about)
    weights.fit(vit, state, str(path), warn=_refuse_change)
    return vit.eval()


def _header(path: Path) -> dict[str, str]:
    """The header of an exported file. Raises ConfigError where it does not describe the network."""
    about = thresholds.header(path) if path.suffix == ".safetensors" else {}
    if not {"model", "classes", "image_size", "args", TOKENS} <= about.keys():
        raise ConfigError(f"{path}: its header does not describe the network; write the file with trilevel export")
    return about


def _network(about: Mapping[str, str]) -> nn.Module:
    """The network of a header with random weights. Raises ValueError."""
    settings = ModelConfig(
        name=about["model"], classes=int(about["classes"]), image_size=int(about["image_size"]), args=json.loads(about["args"])
    )
    return weights.create(settings)


def _refuse_change(text: str) -> None:
    raise ConfigError(f"{text}: these weights are not those of the header; export them again")
