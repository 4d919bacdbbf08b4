"""Compile the graphs of several rows of `make gpu PART=step` at the same time, for the cache from which the rows then load them.

One graph after the other, DeiT-S takes most of a part's minutes in Python, on one core. The process of a row is `compiled_row`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from sparsity.attention_kernel import Kernels
from trainer.bench.gpu import processes
from trainer.bench.gpu.report import Facts
from trainer.storage.source_tree import python_path

AT_ONCE = 5  # processes: each holds the activations of a step, and starts compilers of its own


@dataclass(frozen=True)
class Request:
    """A row of the counts table, words that change the recipe, and [tokens, masked, backend] of its attention."""

    row: str
    words: Sequence[str] = ()
    kernels: Sequence[tuple[int, bool, str]] = ()


def compiled(requests: Sequence[Request], device: torch.device) -> Facts:
    """Seconds of each process; `ok`: all of them ended well."""
    cores = max(1, len(os.sched_getaffinity(0)) // AT_ONCE)
    environment = os.environ | {"PYTHONPATH": python_path(), "TORCHINDUCTOR_COMPILE_THREADS": str(cores)}
    commands = [
        [sys.executable, "-m", "trainer.bench.gpu.compiled_row", json.dumps(asdict(one)), str(device)] for one in requests
    ]
    return processes.all_of(commands, [" ".join((one.row, *one.words)) for one in requests], environment, AT_ONCE)


def packed(kernels: Kernels) -> list[tuple[int, bool, str]]:
    return [(*kind, name) for kind, name in kernels.items()]
