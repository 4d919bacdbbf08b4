"""Random numbers keyed by image, token or step, never by rank: a counter-based hash of int64 keys.

The same key and salts give the same number on any device, rank, micro-batch and world size, and under torch.compile. The mixing
step is the finaliser of splitmix64 (Steele, Lea, Flood 2014) in wrapping int64 arithmetic; shifts are made logical by a mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def uniform(keys: Tensor, *salts: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform in [0, 1), 24 bits: keys (...,) int64 -> (..., *shape) float32. Different salts give independent numbers."""
    return (_words(keys, salts, shape) >> 40 & 0xFFFFFF).to(torch.float32) * 2.0**-24


def normal(keys: Tensor, *salts: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal (Box-Muller): keys (...,) int64 -> (..., *shape) float32. Equal across devices up to rounding of log and cos."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(keys, *salts, 1, shape=shape)))
    return radius * torch.cos((2.0 * math.pi) * uniform(keys, *salts, 2, shape=shape))


def combine(keys: Tensor, others: Tensor) -> Tensor:
    """One key from two, int64, broadcast: e.g. an image's key and a patch id."""
    return _mixed(_mixed(keys) + _spread(others))


def _words(keys: Tensor, salts: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    words = _mixed(_mixed(keys) + _signed(_folded(salts)))
    if not shape:
        return words
    counters = torch.arange(1, math.prod(shape) + 1, device=keys.device)
    return _mixed(words[..., None] + _spread(counters)).unflatten(-1, shape)


def _spread(counters: Tensor) -> Tensor:
    """Multiples of the golden ratio, the states of splitmix64."""
    # `| 0` makes them data: inductor computes a multiple of an arange as an index, in int32, and Triton refuses the factor there
    return (counters | 0) * _signed(_GAMMA)


def _mixed(words: Tensor) -> Tensor:
    first, second = (_signed(m) for m in _MULTIPLIERS)
    words = (words ^ _shifted(words, 30)) * first
    words = (words ^ _shifted(words, 27)) * second
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    return words >> bits & ((1 << (64 - bits)) - 1)


def _folded(salts: tuple[int, ...]) -> int:
    """All salts in one word, on the host; the order of salts matters."""
    word = len(salts)
    for salt in salts:
        word = (word + (salt & _WORD) + _GAMMA) & _WORD
        for bits, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1])):
            word = ((word ^ word >> bits) * multiplier) & _WORD
        word ^= word >> 31
    return word


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word
