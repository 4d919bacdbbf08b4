"""From the configuration to the three levels: the network with its seams, the examples' curriculum, the plan of a moment."""

from __future__ import annotations

import math
from typing import Any

from sparsity import cost, methods
from sparsity.curriculum import Curriculum
from sparsity.examples import EXAMPLES
from sparsity.plans import Course
from sparsity.types import Plan
from sparsity.vit import SparseViT
from trainer import weights
from trainer.config import Config
from trainer.data.index import Index
from trainer.values import ConfigError


def build_model(config: Config) -> SparseViT:
    """The timm VisionTransformer of `config.model`, seeded, with the token and connection levels around it. Raises ConfigError, also
    for one whose multiply-adds are not known: a run tells its savings."""
    network = weights.create(config.model, config.seed)
    if config.engine.checkpointing:
        network.set_grad_checkpointing()
    t = config.tokens
    try:
        model = methods.build(
            network,
            tokens=t.method,
            connections=config.connections.method,
            blocks=t.blocks,
            position=t.position,
            fuse=t.fuse,
            merged=t.merged,
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
    e = config.examples
    if e.method not in EXAMPLES:
        raise ConfigError(f"examples.method={e.method!r}: unknown; there are {', '.join(EXAMPLES)}")
    try:
        return EXAMPLES[e.method](
            len(index),
            index.labels,
            epochs=config.epochs,
            seed=config.seed,
            removed=e.removed,
            swap=e.swap,
            window=e.window,
            updates=e.updates,
            balanced=e.balanced,
            ties=e.ties,
            restore=e.restore,
            anneal=e.anneal,
            repeats=config.data.repeats,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def plan_at(progress: float, config: Config) -> Plan:
    """What a step at this progress (in epochs) keeps."""
    return course_of(config).at(progress)


def last_plan(config: Config) -> Plan:
    """What the last step of a run keeps, and so its last score: a change that falls on the very end is never trained under."""
    return plan_at(math.nextafter(float(config.epochs), 0.0), config)


def course_of(config: Config) -> Course:
    """How the run comes down to `tokens.keep` and `connections.keep`; levels that are off keep all."""
    p = config.plan
    tokens, connections = config.tokens.method != "all", config.connections.method != "all"
    return Course(
        p.method,
        keep_tokens=config.tokens.keep if tokens else 1.0,
        keep_connections=config.connections.keep if connections else 1.0,
        warmup=p.warmup,
        length=p.length,
        plateaus=p.plateaus,
        stairs=[(start, t if tokens else 1.0, c if connections else 1.0) for start, t, c in p.stairs],
    )


def cost_of(model: SparseViT, plan: Plan) -> dict[str, Any]:
    """Tokens in each block and multiply-adds of one image's forward pass under a plan, for the journal."""
    found = cost.cost(cost.shape_of(model), plan)
    return {"tokens": list(found.tokens), "multiply_adds": found.total}
