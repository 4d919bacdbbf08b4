"""Builds the parts of training from the configuration: the network with its mechanisms, the levels of examples and weights, the schedule,
the objective."""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled

from sparsity import build, cost
from sparsity.examples.curriculum import Curriculum, TrainingRun
from sparsity.plan_mix import PlanMix
from sparsity.schedule import KeepSchedule
from sparsity.types import Plan
from sparsity.vit import SparseViT
from sparsity.weights.pruning import Pruning
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.shards.index import Index
from trainer.model import weights
from trainer.model.distillation import Distillation
from trainer.model.objective import Objective
from trainer.model.schedule import Schedule


def build_model(config: Config) -> SparseViT:
    """The timm VisionTransformer of `config.model`, seeded, with the mechanisms of levels 2 and 3. Raises ConfigError, also for
    a network whose multiply-adds are unknown, because a run reports its savings."""
    network = weights.create(config.model, config.seed)
    if config.engine.checkpointing:
        network.set_grad_checkpointing()
    if config.teacher.logits != "none" and isinstance(network, VisionTransformerDistilled):
        network.set_distilled_training(True)  # in training it returns a pair of logits: of [CLS] and of the distillation token
    t = config.tokens
    try:
        model = build.build(
            network,
            tokens=t.settings,
            connections=config.connections.settings,
            blocks=t.blocks,
            position=t.position,
            compat=config.compat,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        cost.shape_of(model)
    except ValueError as error:
        raise ConfigError(f"model.name={config.model.name}: {error}; choose another vit_* or deit* model") from error
    return model


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


def build_pruning(config: Config, model: SparseViT) -> Pruning:
    """Level 4 over the layers of a network, before the engine partitions them. Raises ConfigError."""
    try:
        return config.weights.settings.build(model.vit)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def refuse_frozen(level: Pruning, model: SparseViT) -> None:
    """Raises ConfigError if a parameter that level 4 prunes is frozen; call it after `build_optimizer`."""
    trained = {name for name, parameter in model.vit.named_parameters() if parameter.requires_grad}
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


def cost_of(model: SparseViT, plan: Plan | PlanMix) -> dict[str, Any]:
    """Tokens in each block and multiply-adds of one image's forward pass under a plan, for the journal; their expectations where steps
    draw their plan from several."""
    shape = cost.shape_of(model)
    if isinstance(plan, Plan):
        found = cost.cost(shape, plan)
        return {"tokens": list(found.tokens), "multiply_adds": found.total}
    costs = {part: cost.cost(shape, part) for _, part in plan.parts}
    tokens = [plan.mean(lambda part, block=block: costs[part].tokens[block]) for block in range(len(shape.blocks))]
    return {"tokens": tokens, "multiply_adds": plan.mean(lambda part: costs[part].total)}
