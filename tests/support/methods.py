"""Mechanisms by name with settings from one table, for tests that run over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from sparsity.examples import EXAMPLES
from sparsity.examples.curriculum import TrainingRun
from sparsity.settings import Settings


def fitting(methods: Mapping[str, type[Settings]], name: str, **table: Any) -> Any:
    """The settings of a method: of the table, those that it has."""
    own = {f.name for f in fields(methods[name])}
    return methods[name](**{key: value for key, value in table.items() if key in own})


def curriculum(name: str, labels: np.ndarray, *, epochs: int, seed: int = 0, repeats: int = 1, **settings: Any) -> Any:
    """A method of level 1 over a data set with these labels."""
    return EXAMPLES[name](**settings).build(TrainingRun(len(labels), labels, epochs, seed, repeats))
