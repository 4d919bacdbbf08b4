"""Import DeepSpeed without what its import starts and no run of ours uses: 3.2 s of 10 s CPU of every rank's start.

Measured with `python -X importtime -m trainer train` (deepspeed 0.19.8, torch 2.15, one x86_64 core, 2026-11-22): MLflow for its
autotuner 1.6 s, torch's compiler for its Muon optimizer 1.6 s.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import cast

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


def import_deepspeed() -> None:
    """Import DeepSpeed. Its autotuner then reports no MLflow, and its Muon runs uncompiled; MLflow and torch.compile of this process are
    as before."""
    if "deepspeed" in sys.modules:
        return
    with _without("mlflow"), _compiler_off():
        import deepspeed  # noqa: F401  # the import is the effect

        with contextlib.suppress(ImportError):  # `deepspeed.initialize` imports it to find out whether an optimizer is Muon
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """For the block, `import name` raises ImportError, unless it was imported before."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = cast(ModuleType, None)
    try:
        yield
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def _compiler_off() -> Iterator[None]:
    """For the block, @torch.compile returns the function as it is."""
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before
