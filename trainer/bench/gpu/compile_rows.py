"""Compile the graphs of several rows of `make gpu PART=step` at the same time, for the cache from which the rows then load them.

One graph after the other, DeiT-S takes most of a part's minutes in Python, on one core. `python -m trainer.bench.gpu.compile_rows REQUEST`
is the process of one row: its step runs once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from sparsity.attention_kernel import Kernels
from trainer.bench.gpu import processes
from trainer.bench.gpu.report import Facts, Host
from trainer.storage.source_tree import python_path

AT_ONCE = 4  # processes: each holds the activations of a step, and starts compilers of its own


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
        [sys.executable, "-m", "trainer.bench.gpu.compile_rows", json.dumps(asdict(one)), str(device)] for one in requests
    ]
    return processes.all_of(commands, [" ".join((one.row, *one.words)) for one in requests], environment, AT_ONCE)


def packed(kernels: Kernels) -> list[tuple[int, bool, str]]:
    return [(*kind, name) for kind, name in kernels.items()]


def main(words: Sequence[str]) -> None:
    from trainer.bench.gpu import counts, step

    request, started = Request(**json.loads(words[0])), time.perf_counter()
    torch.set_float32_matmul_precision("high")
    kernels = {(tokens, bool(masked)): name for tokens, masked, name in request.kernels}
    host = Host(torch.device(words[1]), tiny=False, out=None)
    step.step_of(host, step.configured(host, request.words), counts.rows()[request.row], kernels)
    print(f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
