"""Builds the parts of training from the configuration: the network with its mechanisms, the levels of examples and weights, the schedule,
the objective."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from sparsity import build
from sparsity.examples.curriculum import Curriculum, TrainingRun
from sparsity.network import SparseNetwork
from sparsity.plan_mix import PlanMix
from sparsity.schedule import KeepSchedule
from sparsity.types import Plan
from sparsity.weights.pruning import Pruning
from sparsity.weights.stored import sizes
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.shards.index import Index
from trainer.model import batch_norm, weights
from trainer.model.distillation import Distillation
from trainer.model.objective import Objective
from trainer.model.schedule import Schedule


def build_model(config: Config, network: nn.Module | None = None) -> SparseNetwork:
    """The timm network of `config.model`, seeded, or the given one, with the mechanisms of levels 2 and 3. Raises ConfigError, also for a
    network whose multiply-adds are unknown, because a run reports its savings."""
    network = weights.create(config.model, config.seed) if network is None else network
    _refuse_no_patch(network)
    batch_norm.refuse_precision(network, config)
    if config.model.sync_batchnorm:
        batch_norm.synchronise(network, config)
    if config.engine.checkpointing:
        _checkpoint(network, config)
    if config.teacher.logits != "none" and isinstance(network, VisionTransformerDistilled):
        network.set_distilled_training(True)  # in training it returns a pair of logits: of [CLS] and of the distillation token
    model = with_levels(config, network)
    try:
        model.cost()
    except ValueError as error:
        raise ConfigError(
            f"model.name={config.model.name}: {error}; set tokens.method=all and connections.method=all, or choose another network"
        ) from error
    _refuse_attention(config, model)
    if config.engine.residual == "bf16":
        if not model.has_residual:
            raise ConfigError(
                f"engine.residual=bf16: model.name={config.model.name} keeps its tokens in float32; choose a network of "
                f"{build.can(lambda family: family.has_residual)}, or set engine.residual=float32"
            )
        model.residual = torch.bfloat16
    return model


def _refuse_no_patch(network: nn.Module) -> None:
    embed = getattr(network, "patch_embed", None)
    patch, size = (getattr(embed, name, None) for name in ("patch_size", "img_size"))
    if patch and size and patch[0] > size[0] and not getattr(embed, "dynamic_img_pad", False):
        raise ConfigError(
            f"model.image_size={size[0]} is smaller than the patch size {patch[0]}, so there is no patch; set a larger "
            f"model.image_size, or model.args.patch_size<={size[0]}"
        )


def with_levels(config: Config, network: nn.Module) -> SparseNetwork:
    """A timm network with the mechanisms of levels 2 and 3. Raises ConfigError."""
    t = config.tokens
    try:
        return build.build(
            network,
            tokens=t.settings,
            connections=config.connections.settings,
            blocks=t.blocks,
            position=t.position,
            compat=config.compat,
            image_size=config.model.image_size,
        )
    except ValueError as error:
        raise ConfigError(f"model.name={config.model.name}: {error}") from error


def _checkpoint(network: Any, config: Config) -> None:
    try:
        network.set_grad_checkpointing()
    except (AssertionError, AttributeError) as error:
        raise ConfigError(
            f"engine.checkpointing=true: timm has no gradient checkpointing for model.name={config.model.name}; set "
            "engine.checkpointing=false and lower data.micro_batch"
        ) from error


def _refuse_attention(config: Config, model: SparseNetwork) -> None:
    """Raises ConfigError for a setting that reads the attention of a network that gives none."""
    key, remedy = config.examples.settings.reads_attention
    if key and "cls_attention" not in model.gives:
        raise ConfigError(f"{key}: model.name={config.model.name} gives no attention, which breaks the ties; {remedy}")
    if config.teacher.tokens > 0 and "importance" not in model.gives:
        raise ConfigError(
            f"teacher.tokens={config.teacher.tokens:g}: model.name={config.model.name} gives no importance of tokens; choose a network of "
            f"{build.can(lambda family: 'importance' in family.gives)}, or set teacher.tokens=0 and distil logits"
        )


def build_examples(config: Config, index: Index) -> Curriculum:
    """The curriculum of `config.examples` over the examples of an index. Raises ConfigError."""
    probe = config.examples.probe
    run = TrainingRun(
        len(index), index.labels, config.epochs, config.seed, config.data.repeats, probe.probe_share if probe else None
    )
    try:
        return config.examples.settings.build(run)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_pruning(config: Config, model: SparseNetwork) -> Pruning:
    """Level 4 over the layers of a network, before the engine partitions them. Raises ConfigError."""
    if not (config.weights.settings.off or model.prunes_weights):
        raise ConfigError(
            f"weights.method={config.weights.method}: level 4 does not know the layers of a {type(model.network).__name__}; choose a "
            f"network of {build.can(lambda family: family.prunes_weights)}, or set weights.method=all"
        )
    try:
        return config.weights.settings.build(model.network)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def after_pruning(config: Config, model: SparseNetwork) -> str:
    """Multiply-adds and bytes of the network once level 4 has pruned it, in words; "" without level 4. Found by pruning the weights as they
    are now: exact with `weights.per=block`, else about, because the layers' shares then depend on the trained weights."""
    settings: Any = config.weights.settings
    if settings.off:
        return ""
    level = settings.build(model.network)
    level.begin_epoch(config.epochs, lambda: dict(model.network.named_parameters()))
    if level.kept is None:  # keep 1
        return ""
    dense, left = model.cost().total, model.cost(left=level.shares()).total
    stored, whole = sizes(level), 4 * sum(p.numel() for p in model.network.parameters())
    small = whole - stored["dense"] + stored["block"]
    about = "" if settings.per == "block" else "about "
    return (
        f"after pruning {about}{left / 1e9:.4g} of {dense / 1e9:.4g} GMACs with every token ({left / dense:.3f}), "
        f"{about}{small / 1e6:.4g} of {whole / 1e6:.4g} MB of weights in float32, kept groups with their indices ({small / whole:.3f})"
    )


def refuse_frozen(level: Pruning, model: SparseNetwork) -> None:
    """Raises ConfigError if a parameter that level 4 prunes is frozen; call it after `build_optimizer`."""
    trained = {name for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    if frozen := sorted(set(level.parameters) - trained):
        raise ConfigError(
            f"weights.layers: {frozen[0]} is frozen by optim.freeze, so nothing could make up for what is pruned; leave its layer out of "
            "weights.layers, or do not freeze it"
        )


def build_schedule(config: Config) -> Schedule:
    """Keep ratios, learning rate and shown examples as configured."""
    tokens, connections = config.tokens.settings, config.connections.settings
    final = Plan(tokens.final_keep, connections.final_keep)
    keep = KeepSchedule(config.plan.settings, final, tokens=not tokens.off, connections=not connections.off)
    return Schedule(config.epochs, keep, config.optim, config.examples.settings, config.data.repeats)


def build_objective(config: Config) -> Objective:
    """Loss and observations as configured. Raises ConfigError if settings contradict each other."""
    return Objective(config.model.classes, config.optim.loss, smoothing=config.augment.smoothing, rule=config.examples.rule)


def build_distillation(config: Config) -> Distillation:
    """The losses between the network and its teacher; the identity without one."""
    t = config.teacher
    block = config.tokens.blocks[0] if t.tokens else 0
    return Distillation(logits=t.logits, tau=t.tau, alpha=t.alpha, tokens=t.tokens, block=block)


def cost_of(model: SparseNetwork, plan: Plan | PlanMix) -> dict[str, Any]:
    """Tokens in each block and multiply-adds of one image's forward pass under a plan, for the journal; their expectations where steps
    draw their plan from several."""
    if isinstance(plan, Plan):
        found = model.cost(plan)
        return {"tokens": list(found.tokens), "multiply_adds": found.total}
    costs = {part: model.cost(part) for _, part in plan.parts}
    blocks = range(len(next(iter(costs.values())).tokens))
    tokens = [plan.mean(lambda part, block=block: costs[part].tokens[block]) for block in blocks]
    return {"tokens": tokens, "multiply_adds": plan.mean(lambda part: costs[part].total)}
