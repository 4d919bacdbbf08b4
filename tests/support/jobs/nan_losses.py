"""What tests/run/test_nonfinite_steps.py starts on several processes: `trilevel train` in which the last
rank's losses are NaN in some steps.

nan_losses.py STEP,STEP,... WORD ...: the words of `trilevel`; steps as the journal counts.
"""

from __future__ import annotations

import math
import os
import sys

import torch

from trainer.__main__ import main
from trainer.model.objective import Objective
from trainer.run import assembly

torch.set_num_threads(1)
spoiled = {int(step) for step in sys.argv[1].split(",") if step}
last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
at = 0
losses, reseed = Objective.losses, assembly.Engine.reseed


def watched(self, seed, step):
    global at
    at = step + 1
    reseed(self, seed, step)


assembly.Engine.reseed = watched
Objective.losses = lambda self, *args: losses(self, *args) * (math.nan if last and at in spoiled else 1.0)
sys.exit(main(sys.argv[2:]))
