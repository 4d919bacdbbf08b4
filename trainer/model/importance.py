"""The score of tokens that `tokens.importance: default` names in a network, and the one that stored weights were trained with.

A run records the name of the score, never the word "default": in the first line of its journal, in its checkpoints, in exported files
and in thresholds. Weights that were stored before 2026-11-22 have that word; it meant one score for value-based selection and, in
networks with several prefix tokens, another for mass and distillation (`sparsity.settings.Network.default_before`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsity.network import SparseNetwork
from sparsity.settings import Network
from sparsity.vit import SparseViT
from trainer.config.run_config import Config
from trainer.journal.file import JournalError
from trainer.journal.reader import read
from trainer.model.build import with_levels

KEY = "importance"  # of journals, checkpoints and headers
TOKENS = "tokens"  # key of a file's header: the section of the configuration, as JSON


def name_of(config: Config, model: SparseNetwork) -> str:
    """The score by which this run selects or distils; "" where it uses none."""
    used = config.tokens.settings.ranks_by_importance or config.teacher.tokens > 0
    return model.importance if used else ""


def trained_with(config: Config, stored: str | None, about: Network) -> frozenset[str]:
    """The scores of the selection and of distillation that weights were trained with. config: that of the weights. stored: the recorded
    name, None for weights stored before there was one."""
    if stored is not None:
        return frozenset({stored})
    selection, others = about.default_before()
    own = getattr(config.tokens.settings, KEY, "default")
    names = {selection if own == "default" else about.importance(own)} if config.tokens.settings.ranks_by_importance else set()
    return frozenset(names | ({others} if config.teacher.tokens > 0 else set()))


def compared(
    different: Mapping[str, tuple[Any, Any]], config: Config, theirs: Config, stored: str | None, network: SparseNetwork
) -> dict[str, tuple[Any, Any]]:
    """The settings (now, in the checkpoint) that keep a resume from its checkpoint, with the scores that `tokens.importance` stands for in
    place of its words. theirs, stored: of the checkpoint."""
    if not isinstance(network, SparseViT) or not (now := name_of(config, network)):
        return dict(different)
    before = trained_with(theirs, stored or None, network.about)
    rest = {key: values for key, values in different.items() if key != f"tokens.{KEY}"}
    return rest if before == {now} else rest | {f"tokens.{KEY}": (now, " and ".join(sorted(before)))}


def pinned(config: Config, network: SparseNetwork, stored: str | None) -> tuple[Config, SparseNetwork]:
    """`config` of stored weights and their network, with the score by which they were selected in place of `default`, so that their meaning
    stays. stored: see `stored_with`."""
    settings = config.tokens.settings
    if getattr(settings, KEY, "") != "default" or not isinstance(network, SparseViT) or stored is None:
        return config, network
    name = network.about.default_before()[0] if stored == "default" else stored
    if name == network.importance:
        return config, network
    config = config.changed(tokens={"settings": replace(settings, **{KEY: name})})
    again = with_levels(config, network.network)
    again.residual = network.residual
    return config, again


def stored_with(source: Path, header: Mapping[str, str]) -> str | None:
    """The score that a run's directory, or a weights file with this header, records: its name; "default" from before there were names; None
    where nothing tells."""
    if TOKENS in header:
        return json.loads(header[TOKENS]).get(KEY)
    run = source if source.is_dir() else source.parent
    try:
        starts = [line for line in read(run) if line["kind"] == "start"]
    except JournalError:
        return None
    return starts[-1].get(KEY, "default") if starts else None
