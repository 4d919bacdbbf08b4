"""`trilevel WORD ...` that writes the configuration of the live DeepSpeed engine to FILE: live_deepspeed_config.py FILE WORD ..."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from trainer.__main__ import main
from trainer.run import assembly
from trainer.run.shutdown import end_process

torch.set_num_threads(1)
prepare = assembly.Engine.prepare


def watched(self, *args):
    prepare(self, *args)
    live = self.model
    reported = {"kind": type(live).__name__, "stage": live.zero_optimization_stage(), "config": live.config}
    reported["reduce_bucket_size"] = live.zero_reduce_bucket_size()
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(reported, default=str))


assembly.Engine.prepare = watched
code = main(sys.argv[2:])
end_process(code)
sys.exit(code)
