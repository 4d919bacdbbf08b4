"""Refuses a run in which more images are broken than `data.broken_share` allows, in training or in validation."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.data.errors import DataError
from trainer.engine.engine import Engine
from trainer.model.evaluate import Scores


def refuse_training(broken: Mapping[str, str], examples: int, allowed: float) -> None:
    """Raises DataError where more images of the data set are broken than the share `allowed`. broken: {id: reason} so far."""
    if len(broken) > allowed * examples:
        first = "; ".join(list(broken.values())[:3])
        raise DataError(
            f"{len(broken)} of {examples} images are broken, more than data.broken_share={allowed}: {first}. "
            "List them with `trilevel verify SHARDS`, pack again without them, or raise data.broken_share"
        )


def of_validation(scores: Scores, engine: Engine, allowed: float) -> str:
    """A message that names broken validation images; collective. Raises DataError where their share is above `allowed`."""
    every, first = scores.images + scores.broken, engine.all_gather_objects(list(scores.reasons))[:3]
    text = f"{scores.broken} of {every} validation images are broken and not scored: {'; '.join(first)}"
    if scores.broken > allowed * every:
        raise DataError(
            f"{text}. That is more than data.broken_share={allowed}; list them with `trilevel verify SHARDS`, restore the shards and "
            "continue with --resume, or raise data.broken_share"
        )
    return text
