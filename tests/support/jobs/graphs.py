"""`trilevel WORD ...` with torch.compile's graphs counted and run as they are, without code; at its end [graphs, breaks] as a JSON line."""

from __future__ import annotations

import json
import sys

import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from trainer.__main__ import main
from trainer.run import dense_baseline
from trainer.run.shutdown import end_process

torch.set_num_threads(1)
dense_baseline.WARM, dense_baseline.WATCHED = 2, 4  # an epoch has 9 steps
counter = CompileCounter()
compiler = torch.compile
torch.compile = lambda function, **settings: compiler(function, **(settings | {"backend": counter}))
code = main(sys.argv[1:])
print(json.dumps([counter.frame_count, sum(counters["graph_break"].values())]), flush=True)
end_process(code)
sys.exit(code)
