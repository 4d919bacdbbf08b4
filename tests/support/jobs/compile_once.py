"""Ranks over gloo that compile a small network, forward and backward; a JSON line per rank: graphs found compiled, graphs compiled,
seconds to the end of the first step.

compile_once.py [apart]: apart = without the lock of the node.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn
from torch._dynamo.utils import counters

from trainer.config.run_config import EngineConfig, OptimConfig
from trainer.data.order import BatchSplit
from trainer.engine import environment
from trainer.engine.engine import Engine
from trainer.model.optimizer import build_optimizer
from trainer.run.shutdown import end_process

torch.set_num_threads(1)
if "apart" in sys.argv:
    environment.share_compiling = lambda *_: None
engine = Engine(EngineConfig(kind="ddp", precision="float32", compile=True, timeout=7200.0), BatchSplit(4, 1, 4))
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(16 + i, 17 + i), nn.GELU(), nn.LayerNorm(17 + i)) for i in range(6)))
engine.prepare(model, build_optimizer(model, OptimConfig()))
engine.all_reduce_sum(torch.zeros(1))  # both begin now
began = time.monotonic()
engine.backward(engine.forward(torch.ones(4, 16)).square().mean(), True)
engine.step()
seconds = time.monotonic() - began
found, made = counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
print(json.dumps({"rank": engine.rank, "found": found, "made": made, "seconds": round(seconds, 1)}), flush=True)
engine.close()
end_process(0)
