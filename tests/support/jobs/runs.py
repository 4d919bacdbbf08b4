"""Several runs one after the other in the same processes, which spares their start: runs.py CONFIG "key=value ..." ..."""

from __future__ import annotations

import sys

from accelerate.state import AcceleratorState

from trainer.config.load import load
from trainer.run.shutdown import end_process
from trainer.train import train

for overrides in sys.argv[2:]:
    train(load(sys.argv[1], overrides.split()))
    AcceleratorState._reset_state(reset_partial_state=True)  # the process group stays
end_process(0)
