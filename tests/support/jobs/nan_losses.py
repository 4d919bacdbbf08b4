"""What tests/run/test_nonfinite_steps.py starts on several processes: `trilevel train` in which the last
rank's losses are NaN in some steps.

nan_losses.py STEP,STEP,... WORD ...: the words of `trilevel`; steps as the journal counts. With LATE=1 outcomes of steps are decided and
read as on a GPU: by the fused optimizer, two steps later.
"""

from __future__ import annotations

import math
import os
import sys
from functools import partial

import torch

from trainer.__main__ import main
from trainer.engine.delayed import Delayed
from trainer.engine.left_out_steps import leaves_out_on_device
from trainer.model.objective import Objective
from trainer.run import assembly, nonfinite_steps
from trainer.run.shutdown import end_process

torch.set_num_threads(1)
spoiled = {int(step) for step in sys.argv[1].split(",") if step}
last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
at = 0
losses, reseed = Objective.losses, assembly.Engine.reseed


def watched(self, seed, step):
    global at
    at = step + 1
    reseed(self, seed, step)


if os.environ.get("LATE"):
    prepare = assembly.Engine.prepare

    def prepared(self, *args):
        prepare(self, *args)
        self.decides_on_device = leaves_out_on_device(self.optimizer)
        assert self.decides_on_device

    assembly.Engine.prepare = prepared
    nonfinite_steps.Delayed = partial(Delayed, behind=2)
assembly.Engine.reseed = watched
Objective.losses = lambda self, *args: losses(self, *args) * (math.nan if last and at in spoiled else 1.0)
code = main(sys.argv[2:])
end_process(code)
sys.exit(code)
