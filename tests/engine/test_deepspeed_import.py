"""The import of DeepSpeed brings neither MLflow nor torch's compiler into a rank, and both work afterwards."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import environment

PROGRAM = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
from trainer.engine.deepspeed_import import import_deepspeed
import_deepspeed()
import deepspeed, torch
import deepspeed.runtime.zero.muon.muon_optimizer  # as `deepspeed.initialize` does
for name in ("mlflow", "torch._inductor.compile_fx"):
    assert name not in sys.modules, name
assert "TORCHDYNAMO_DISABLE" not in os.environ
ran = []
def backend(graph, inputs):
    ran.append(len(inputs))
    return graph.forward
assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).tolist() == [2, 2] and ran == [1]
import mlflow.entities
"""


def test_deepspeed_brings_neither_mlflow_nor_the_compiler_and_both_still_work() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
