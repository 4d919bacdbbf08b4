"""What tests/engine/test_engine.py starts on several processes: a small network through the real engine, its losses as JSON lines.

one_engine.py KIND ZERO PRECISION ACCUMULATION START STOP FOLDER [lamb]: steps START .. STOP; saves after each, loads START's state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.optim import Lamb

from trainer.config import run_config
from trainer.data.order import BatchSplit, slice_of
from trainer.engine.engine import Engine
from trainer.engine.environment import world_size
from trainer.run.shutdown import end_process

BATCH = 12
kind, zero, precision, accumulation, start, stop, folder, *lamb = sys.argv[1:]
torch.set_num_threads(1)
rows = BATCH // world_size()
batch_split = BatchSplit(rows // int(accumulation), int(accumulation), rows)
engine = Engine(run_config.EngineConfig(kind=kind, zero=int(zero), precision=precision), batch_split, clip=1.0)  # type: ignore[arg-type]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.GELU(), torch.nn.LayerNorm(33), torch.nn.Linear(33, 5))
decayed = [p for p in model.parameters() if p.ndim > 1]
optimizer = (Lamb if lamb else torch.optim.AdamW)(
    [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
)
held = Path(folder) / f"step-{start}.safetensors"
if int(start):
    saved = load_file(held)
    weights = {k[2:]: v for k, v in saved.items() if k.startswith("w:")}
    model.load_state_dict(weights)
engine.prepare(model, optimizer)
if int(start):
    engine.state.load(weights, {k[2:]: v for k, v in saved.items() if k.startswith("o:")})
for step in range(int(start), int(stop)):
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-2 * (step + 1)
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 16, generator=generator)
    labels = torch.randint(0, 5, (BATCH,), generator=generator)
    first, last = slice_of(BATCH, engine.world, engine.rank)
    total = torch.zeros(())
    for begin in range(first, last, batch_split.micro_batch):
        part = slice(begin, begin + batch_split.micro_batch)
        losses = torch.nn.functional.cross_entropy(engine.forward(images[part]).float(), labels[part], reduction="none")
        engine.backward(losses.sum() / BATCH, part.stop >= last)
        total += losses.detach().sum() / BATCH
    engine.step()
    state = {"w:" + k: v for k, v in engine.state.weights().items()} | {
        "o:" + k: v for k, v in engine.state.optimizer_state().items()
    }
    loss = float(engine.all_reduce_sum(total))
    if engine.is_main:
        save_file(state, Path(folder) / f"step-{step + 1}.safetensors")
        print(json.dumps({"step": step, "loss": loss, "norm": engine.grad_norm()}), flush=True)
engine.close()
end_process(0)
