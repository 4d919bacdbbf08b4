"""Run the code that inductor writes for a GPU on CPU tensors, kernel by kernel, in Triton's interpreter (numpy).

TRITON_INTERPRET=1 must be set before Triton is imported, so this runs in a process of its own: `python -m tests.support.triton_interpreter`
prints a JSON object {what: [number of values that differ from eager, of each output]} of every row of `ROWS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsity import attention, keyed_random
from sparsity.tokens import scores
from trainer.bench.gpu import lowering, pretended

_DECORATORS = re.compile(r"@triton_heuristics\.\w+\(.*?\n\)\n@triton\.jit", re.DOTALL)
BLOCKS = {"XBLOCK": 64, "YBLOCK": 16, "R0_BLOCK": 64}
# what a program does on a GPU -> the same on the CPU
HERE = {
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
    "get_raw_stream(0)": "0",
    "empty_strided_cuda(": "EMPTY(",
    "async_compile.triton(": "INTERPRETED(",
    "async_compile.wait(globals())": "",
}


class Interpreted:
    """One kernel, launched over its whole grid."""

    def __init__(self, name: str, source: str, **_: Any) -> None:
        from torch._inductor.codecache import PyCodeCache

        plain, found = _DECORATORS.subn("@triton.jit", source)
        assert found == 1, source
        self.kernel = getattr(PyCodeCache.load(plain), name)

    def run(self, *arguments: Any, stream: int) -> None:
        names = self.kernel.arg_names
        blocks = {name: BLOCKS[name] for name in names[len(arguments) :]}
        sizes = dict(zip(names, arguments, strict=False))
        grid = [-(-sizes[f"{axis}numel"] // blocks.get(f"{axis.upper()}BLOCK", 1)) for axis in "xy" if f"{axis}numel" in sizes]
        self.kernel[tuple(grid)](*arguments, **blocks)


def interpreted(program: str) -> Callable[[list[Any]], Any]:
    """The function that a program of inductor defines, on CPU tensors."""
    for there, here in HERE.items():
        program = program.replace(there, here)
    names: dict[str, Any] = {"INTERPRETED": Interpreted, "EMPTY": _empty, "__name__": "interpreted", "__file__": "interpreted"}
    exec(program, names)
    return names["call"]


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


def _draws(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keyed_random.uniform(keys, 3), keyed_random.uniform(keys, 5, 7, shape=(12, 2))


def _pairs(keys: Tensor) -> Tensor:
    return keyed_random.combine(keys[:, None], torch.arange(23))


def _chosen(tokens: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    index = scores.ranked(keyed_random.uniform(keys, 11, shape=(tokens.shape[1],)))[:, :9]
    return index, attention.gather_tokens(tokens, index, 1)


def _gradient_of_chosen(keys: Tensor, gradient: Tensor) -> Tensor:
    index = scores.ranked(keyed_random.uniform(keys, 11, shape=(17,)))[:, :9]
    return attention.spread_back(gradient, index, 1, 17)


def _ties(values: Tensor) -> Tensor:
    return scores.ranked(values)


KEYS = torch.arange(-3, 3) * 2**61 + 11
ROWS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "keyed draws": (_draws, (KEYS,)),
    "keys of pairs": (_pairs, (KEYS,)),
    "random tokens: sort and gather": (_chosen, (torch.arange(6 * 17 * 4).view(6, 17, 4).float(), KEYS)),
    "gradient of the gather": (_gradient_of_chosen, (KEYS, torch.arange(6 * 9 * 4).view(6, 9, 4).float() + 1)),
    "sort with ties": (_ties, (torch.arange(6 * 17).view(6, 17).float() % 3,)),
}


def main() -> None:
    found = {}
    for what, (function, inputs) in ROWS.items():
        eager = function(*inputs)
        with pretended.h200():
            (graph,) = lowering.lower(function, *inputs, backward=False, autocast=False)
            results = interpreted(graph.program)(list(inputs))
        eager = eager if isinstance(eager, tuple) else (eager,)
        assert len(eager) == len(results) and all(a.shape == b.shape for a, b in zip(eager, results, strict=True)), what
        found[what] = [int((a != b).sum()) for a, b in zip(eager, results, strict=True)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
