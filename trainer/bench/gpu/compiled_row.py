"""`python -m trainer.bench.gpu.compiled_row REQUEST DEVICE`, started by `compile_rows`: one step of a row, for the graphs that it leaves in
torch's cache.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from trainer.bench.gpu import counts, step
from trainer.bench.gpu.compile_rows import Request
from trainer.bench.gpu.report import Host

if __name__ == "__main__":
    request, started = Request(**json.loads(sys.argv[1])), time.perf_counter()
    torch.set_float32_matmul_precision("high")  # as in the part: it belongs to a graph's key
    host = Host(torch.device(sys.argv[2]), tiny=False, out=None)
    kernels = {(tokens, bool(masked)): name for tokens, masked, name in request.kernels}
    step.step_of(host, step.configured(host, request.words), counts.rows()[request.row], kernels)
    print(f"{time.perf_counter() - started:.1f} s")
