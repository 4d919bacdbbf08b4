"""What tests/laws/test_every_mechanism.py starts on two processes: runs of the real trainer, one after the other in the same processes.

mechanisms.py CONFIG STEP RUN ...: each RUN is "NAME key=value ...". It is trained whole as NAME; then NAME-resumed begins with the
checkpoint that NAME had at STEP, and continues from there.
"""

from __future__ import annotations

import shutil
import sys

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from trainer.config.load import load
from trainer.run.shutdown import end_process
from trainer.train import train

torch.set_num_threads(1)
step = f"checkpoints/step-{int(sys.argv[2]):08d}"
for run in sys.argv[3:]:
    name, *words = run.split()
    for start in (name, f"{name}-resumed"):
        if start != name:
            if dist.get_rank() == 0:
                shutil.copytree(f"runs/{name}/{step}", f"runs/{start}/{step}")
            dist.barrier()
        train(load(sys.argv[1], [*words, f"name={start}"]), resume=start != name)
        AcceleratorState._reset_state(reset_partial_state=True)  # the process group stays
end_process(0)
