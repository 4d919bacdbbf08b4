"""`trilevel WORD ...` in which the last rank fails before step 3; with KILLED=1 by SIGKILL."""

from __future__ import annotations

import os
import signal
import sys

import torch

from trainer.__main__ import main
from trainer.run import assembly

torch.set_num_threads(1)
reseed = assembly.Engine.reseed


def failing(self, seed, step):
    if step == 2 and self.rank == int(os.environ["WORLD_SIZE"]) - 1:
        if os.environ.get("KILLED"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("the disk of this node is gone")
    reseed(self, seed, step)


assembly.Engine.reseed = failing
sys.exit(main(sys.argv[1:]))
