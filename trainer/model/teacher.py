"""A teacher: frozen weights of a run, a file or timm that see the same images as the network in training.

It is built beside the network and never a part of it: no optimizer, DDP or ZeRO sees its parameters, no checkpoint holds them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import PatchDropout
from torch import Tensor

from sparsity.attention_kernel import Kernels
from sparsity.build import build
from sparsity.network import SparseNetwork
from sparsity.types import DENSE, ModelOutput
from sparsity.vit import SparseViT
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.config.run_config import Config
from trainer.config.schema import ModelConfig
from trainer.engine.engine import Engine
from trainer.model import heads, weights
from trainer.model.optimizer import EMBEDDING, frozen
from trainer.model.origin import of_timm, origin

log_warning = logging.getLogger(__name__).warning


class Teacher:
    """network: frozen, in evaluation mode; None: no teacher, every method does nothing. hash: of its weights, "" without one.
    outputs: what it returns beside its logits."""

    def __init__(self, network: SparseNetwork | None = None, digest: str = "", outputs: frozenset[str] = frozenset()):
        self.network, self.hash, self._outputs = network, digest, outputs
        self._engine: Engine | None = None

    def prepare(self, engine: Engine) -> None:
        """Move it to the device, in the precision of the run; compile it where the run compiles."""
        self._engine = engine
        if self.network is not None:
            self.network.to(engine.device, torch.bfloat16 if engine.settings.precision == "bf16" else torch.float32)
            if engine.settings.compile:
                self.network.compile()

    def use_kernels(self, kernels: Kernels) -> None:
        """Those of the network that it teaches: its images have as many tokens."""
        if self.network is not None:
            self.network.kernels = kernels

    @torch.no_grad()
    def observe(self, images: Tensor, end_phase: Callable[[str], None]) -> ModelOutput | None:
        """Its output for augmented and mixed images (b, 3, H, W) float; no gradient, no random draw, no communication.

        end_phase: of the meters; the teacher's time is a phase of its own.
        """
        if self.network is None or self._engine is None:
            return None
        end_phase("forward")
        taught = self._engine.forward_unwrapped(self.network, images, DENSE, self._outputs)
        end_phase("teacher")
        return taught

    @property
    def multiply_adds(self) -> int:
        """Of one image; 0 without a teacher."""
        return self.network.cost().total if self.network is not None else 0

    def facts(self) -> dict[str, Any]:
        """For the first line of an attempt: hash, parameters, memory of the weights on each device, multiply-adds of an image."""
        if self.network is None:
            return {}
        parameters = list(self.network.parameters())
        return {
            "teacher_hash": self.hash,
            "teacher_parameters": sum(p.numel() for p in parameters),
            "teacher_memory_mib": round(sum(p.numel() * p.element_size() for p in parameters) / 2**20, 1),
            "teacher_multiply_adds": self.multiply_adds,
        }


def build_teacher(
    config: Config, student: SparseNetwork, outputs: frozenset[str], warn: Callable[[str], None] = log_warning
) -> Teacher:
    """The teacher of `config.teacher` on the CPU. outputs: see `Distillation.teacher_outputs`.

    Raises ConfigError, naming key and remedy, for weights that do not fit their network and for a teacher that does not fit `student`.
    """
    if not config.teacher.on:
        return Teacher()
    source, settings = f"teacher.from={config.teacher.source}", _network(config)
    pretrained = settings.init == "timm"
    network = weights.build(settings, 0, pretrained=pretrained, section="teacher")
    heads.refuse_other(network, settings, settings.init, source)
    if pretrained:
        state = network.state_dict()
        reset = ["head"] if weights.about(network).get("num_classes") != settings.classes else []
    else:
        state = weights.weights_at(settings.init, "teacher.from", settings.args)
        reset = weights.fit(network, state, source, warn)
    if config.teacher.logits != "none" and reset:
        raise ConfigError(
            f"{source} with teacher.logits={config.teacher.logits}: the teacher has another number of classes than model.classes="
            f"{config.model.classes}, so its logits mean other things; fine-tune it on these classes first (docs/fine-tuning.md), or "
            "set teacher.logits=none"
        )
    try:
        teacher = build(network, image_size=settings.image_size).requires_grad_(False).eval()
    except ValueError as error:
        raise ConfigError(f"teacher.name={settings.name}: {error}") from error
    if config.teacher.tokens > 0:
        _refuse_other_tokens(config, teacher, student, source)
    return Teacher(teacher, tensors_hash(state, f"{settings.name} {json.dumps(settings.args, sort_keys=True)}"), outputs)


def _network(config: Config) -> ModelConfig:
    """Name and arguments of the teacher's network: its own, else those of the run that it is from, else the student's."""
    teacher, model = config.teacher, config.model
    if teacher.name is None and Path(teacher.source).is_dir():
        model = load_run(teacher.source).model
    name = teacher.name or model.name
    args = teacher.args if teacher.args is not None else {} if teacher.name else model.args
    return ModelConfig(
        name=name, args=args, init=teacher.source, classes=config.model.classes, image_size=config.model.image_size
    )


def _refuse_other_tokens(config: Config, teacher: SparseNetwork, student: SparseNetwork, source: str) -> None:
    """Raises ConfigError where the teacher's attention is over other tokens than the student's importance."""
    asked, first = f"teacher.tokens={config.teacher.tokens:g}", config.tokens.blocks[0]
    tokens = config.tokens.settings
    if not (tokens.off or tokens.ranks_by_importance):
        raise ConfigError(
            f"{asked} with tokens.method={config.tokens.method}: distillation trains the importance of tokens, by which this "
            "method selects none; set tokens.method=topk, or teacher.tokens=0 and distil logits"
        )
    if "importance" not in teacher.gives:
        raise ConfigError(
            f"{source} with {asked}: a {type(teacher.network).__name__} gives no attention of [CLS]; choose a teacher of "
            f"{SparseViT.models}, or set teacher.tokens=0 and distil logits"
        )
    if student.importance == "value_norm" or (student.importance == "received" and student.network.has_class_token):
        raise ConfigError(
            f"{asked} with tokens.importance={student.importance}: distillation teaches the attention of the prefix tokens, by which no "
            "token would be selected; leave out tokens.importance, or set teacher.tokens=0"
        )
    if first >= (depth := len(student.network.blocks)):
        raise ConfigError(
            f"{asked} with tokens.blocks={list(config.tokens.blocks)}: model.name={config.model.name} has blocks 0 to {depth - 1}"
        )
    trained = set(dict(student.network.named_parameters())) - frozen(student.network, config.optim.freeze)
    if not any(name.startswith(before(first)) for name in trained):
        raise ConfigError(
            f"{asked} with optim.freeze={config.optim.freeze!r}: the importance of block {first} (tokens.blocks) depends on frozen "
            f"parameters alone, so distillation would train nothing; set optim.freeze<={first}, or teacher.tokens=0"
        )
    theirs, ours = (network.grid for network in (teacher, student))
    if theirs != ours:
        raise ConfigError(
            f"{source} with {asked}: the teacher has a grid of {theirs[0]} x {theirs[1]} patches, the model {ours[0]} x {ours[1]}; choose "
            "a teacher with the same patch size, or set teacher.tokens=0 and distil logits"
        )
    theirs, ours = (network.network.num_prefix_tokens for network in (teacher, student))
    if theirs != ours:
        raise ConfigError(
            f"{source} with {asked}: the teacher has {theirs} prefix tokens, the model {ours}; choose a teacher with the same [CLS], "
            "distillation and register tokens, or set teacher.tokens=0 and distil logits"
        )
    drop = student.network.patch_drop
    if isinstance(drop, PatchDropout) and drop.prob > 0:
        raise ConfigError(
            f"{asked} with model.args.patch_drop_rate={drop.prob:g}: the model drops patches at random before its blocks, so its "
            "importance is of other patches than the teacher's attention; set patch_drop_rate=0, or teacher.tokens=0"
        )


def teacher_pixels(config: Config) -> list[str]:
    """A sentence where the teacher's weights were trained with other pixel statistics than the images of the run have."""
    if not config.teacher.on:
        return []
    settings = _network(config)
    own = of_timm(settings.name) if settings.init == "timm" else origin(Path(settings.init))
    different = own.other_pixels(config.augment)
    return [
        f"teacher.from={config.teacher.source}: its weights were {different}; set augment.mean and augment.std to theirs"
    ] * bool(different)


def before(block: int) -> tuple[str, ...]:
    """Beginnings of the names of the parameters on which the attention of a block depends."""
    own = (f"blocks.{block}.{part}." for part in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm"))
    return (*EMBEDDING, *(f"blocks.{number}." for number in range(block)), *own)


def tensors_hash(state: Mapping[str, Tensor], network: str) -> str:
    """Hash of names, types, shapes and values, whatever the file that holds them, and of a text that names the network they are for:
    some of its arguments, like the number of heads, show in no shape."""
    digest = hashlib.blake2b(f"{network}\n".encode(), digest_size=16)
    for name in sorted(state):
        value = state[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
