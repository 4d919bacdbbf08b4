"""The numbers in an optimizer's state (step counts, flags, factors) as tensors of a checkpoint, and back.

Python's numbers are told from tensors without dimensions, because they round otherwise: .9 ** 3 is a float64, .9 ** tensor(3) a float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COUNTS = ("step", "lookahead_step")  # in the parameter groups: of timm's LAMB, of its Lookahead
ON_HOST = ("step", "mu_product")  # tensors that torch keeps on the CPU unless its kernel reads them (`fused`, `capturable`)
_TYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


def is_number(value: Any) -> bool:
    return value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, tuple(_TYPES))


def encoded(key: str, value: Any) -> tuple[str, Tensor]:
    """Name and tensor for the checkpoint: `key` for a tensor, `key:TYPE` for one of Python's numbers."""
    if isinstance(value, Tensor):
        return key, value.detach().cpu().clone()
    return f"{key}:{type(value).__name__}", torch.tensor(value, dtype=_TYPES[type(value)])


def decoded(name: str, value: Tensor) -> tuple[str, Any]:
    """The reverse of `encoded`."""
    key, _, kind = name.partition(":")
    return key, value.item() if kind else value


def numbers_of(states: Mapping[str, Mapping[str, Any]], first: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"|key": number} of `first`, and {"name|key": number} of every parameter where they differ or some have none.

    states: {name: state} of the parameters that have a state; empty under ZeRO, where all share that of `first`."""
    found = dict(encoded(f"|{key}", value) for key, value in first.items() if is_number(value))
    for key in sorted({key for state in states.values() for key, value in state.items() if is_number(value)}):
        values = {name: state[key] for name, state in states.items() if key in state and is_number(state[key])}
        if len(values) < len(states) or not _equal(list(values.values())):
            found |= dict(encoded(f"{name}|{key}", value) for name, value in values.items())
    return found


def _equal(values: list[Any]) -> bool:
    if all(isinstance(value, Tensor) for value in values):
        whole = torch.stack(values)  # one wait for the device
        return bool((whole == whole[0]).all())
    return all(type(value) is type(values[0]) and bool(value == values[0]) for value in values)
