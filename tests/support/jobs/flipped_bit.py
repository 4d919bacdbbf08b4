"""`trilevel WORD ...` in which one bit of a weight flips on the last rank after the optimizer step 5."""

from __future__ import annotations

import os
import sys

import torch

from trainer.__main__ import main
from trainer.run import assembly
from trainer.run.shutdown import end_process

torch.set_num_threads(1)
step, steps = assembly.Engine.step, 0


def flipping(self):
    global steps
    taken = step(self)
    steps += 1
    if steps == 5 and self.rank == int(os.environ["WORLD_SIZE"]) - 1:
        weight = dict(self.module.named_parameters())["network.blocks.1.mlp.fc1.weight"]
        weight.data.view(torch.int32)[3, 7] ^= 1 << 20  # of the mantissa: the weight changes by up to 12 %
    return taken


assembly.Engine.step = flipping
code = main(sys.argv[1:])
end_process(code)
sys.exit(code)
