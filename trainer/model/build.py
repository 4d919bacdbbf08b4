"""From the configuration to the three levels: the network with its seams, the examples' curriculum, the plan of a moment."""

from __future__ import annotations

from typing import Any

from sparsity import build, cost
from sparsity.examples import EXAMPLES
from sparsity.examples.curriculum import Curriculum
from sparsity.types import Plan
from sparsity.vit import SparseViT
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.shards.index import Index
from trainer.model import weights


def build_model(config: Config) -> SparseViT:
    """The timm VisionTransformer of `config.model`, seeded, with the token and connection levels around it. Raises ConfigError, also
    for one whose multiply-adds are not known: a run tells its savings."""
    network = weights.create(config.model, config.seed)
    if config.engine.checkpointing:
        network.set_grad_checkpointing()
    t = config.tokens
    try:
        model = build.build(
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


def cost_of(model: SparseViT, plan: Plan) -> dict[str, Any]:
    """Tokens in each block and multiply-adds of one image's forward pass under a plan, for the journal."""
    found = cost.cost(cost.shape_of(model), plan)
    return {"tokens": list(found.tokens), "multiply_adds": found.total}
