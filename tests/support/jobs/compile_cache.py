"""`trilevel WORD ...`, and at its end what torch.compile found made and had to make, as a JSON line."""

from __future__ import annotations

import json
import sys

import torch
from torch._dynamo.utils import counters

from trainer.__main__ import main

torch.set_num_threads(1)
code = main(sys.argv[1:])
found, graphs = counters["aot_autograd"], counters["inductor"]
print(json.dumps({
    "hits": found["autograd_cache_hit"] + graphs["fxgraph_cache_hit"], "misses": graphs["fxgraph_cache_miss"],
}), flush=True)  # fmt: skip
sys.exit(code)
