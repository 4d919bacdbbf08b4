"""How well a network's importance of tokens ranks them as a teacher's last block does: what token distillation (SaiT) is to improve."""

from __future__ import annotations

from pathlib import Path

import torch
from scipy.stats import rankdata
from torch import Tensor

from sparsity.network import SparseNetwork
from sparsity.types import DENSE
from sparsity.vit import SparseViT
from trainer.analysis.evaluation.adaptive_model import adaptive_model
from trainer.analysis.evaluation.precision import Computed
from trainer.analysis.evaluation.scored_model import scored_model
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.augment.on_device import normalise
from trainer.data.loader.build import validation_set
from trainer.data.loader.dataset import open_indexes


@torch.no_grad()
def agreement(model: str, teacher: str, config: Config | None, overrides: list[str] | None = None) -> float:
    """Spearman's rank correlation over the patches of an image, mean over the validation images: importance of `model` at its pruning
    block, and attention of the [CLS] token in the teacher's last block. teacher: a run directory, or a weights file of the same network.
    Raises ConfigError."""
    config, student, _ = scored_model(model, config, overrides or [], "eval")
    adaptive, computed = adaptive_model(config, student), Computed.of(config)
    other = teacher_of(teacher, config, student, model)
    computed.place(adaptive, other)
    found: list[float] = []
    _, index = open_indexes(config.data)
    for batch in validation_set(index, config, 0, 1):
        there = batch.weights > 0
        images = normalise(batch.images[there].to(computed.device), config.augment)
        with computed.autocast():
            ours = adaptive.model.until(adaptive.block, images)[1]
            theirs = other(images, DENSE, frozenset({"cls_attention"})).cls_attention
        assert theirs is not None
        found += spearman(ours, theirs).tolist()
    return sum(found) / len(found)


def teacher_of(teacher: str, config: Config, student: SparseNetwork, model: str) -> SparseNetwork:
    """The network of `--teacher`, a run directory or a weights file of the network of `config`. Raises ConfigError where its attention is
    over other tokens than those of `student`, which is of `model`."""
    _, other, _ = scored_model(teacher, None if Path(teacher).is_dir() else config, [], "eval --teacher")
    if "importance" not in other.gives:
        raise ConfigError(
            f"--teacher {teacher}: a {type(other.network).__name__} gives no attention; choose a network of {SparseViT.models}"
        )
    if student.grid != other.grid:
        raise ConfigError(
            f"--teacher {teacher}: its patch grid is {other.grid}, that of {model} {student.grid}; give weights of the same patch size"
        )
    theirs, ours = (network.network.num_prefix_tokens for network in (other, student))
    if theirs != ours:
        raise ConfigError(
            f"--teacher {teacher}: it has {theirs} prefix tokens, {model} {ours}; give weights with the same [CLS], distillation and "
            "register tokens"
        )
    return other


def spearman(ours: Tensor, theirs: Tensor) -> Tensor:
    """Rank correlation of each row, ties shared: two (B, n) -> (B,) float64."""
    a, b = (torch.from_numpy(rankdata(values.double().cpu().numpy(), axis=1)) for values in (ours, theirs))
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).sum(dim=1) / (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
