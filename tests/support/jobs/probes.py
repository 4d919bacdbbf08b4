"""What tests/run/test_example_probe.py starts: runs with the rule `probe`, one after the other in the same processes.

probes.py CONFIG SCENE ...: each becomes runs/SCENE. "clear" probes nothing, "zeroN" trains with that stage, "bf16" with bf16
parameters, "worldN" without dropout; "interrupted" is asked to stop on its last rank, before the second batch of its second probe,
and resumed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState

from trainer.config.load import load
from trainer.data.batch import Batch
from trainer.data.loader import build
from trainer.data.loader.validation import CleanImages
from trainer.run.shutdown import end_process
from trainer.train import train

RANK, LAST = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
torch.set_num_threads(1)


class Interrupted(CleanImages):
    probes = 0

    def of(self, ids: Any) -> Iterator[Batch]:
        Interrupted.probes += 1
        for number, batch in enumerate(super().of(ids)):
            if Interrupted.probes == 2 and number == 1 and RANK == LAST:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def run(scene: str, resume: bool = False) -> None:
    words = {"clear": ["examples.rule=clear"], "bf16": ["engine.precision=bf16"]}.get(scene, [])
    words = [f"engine.zero={scene[-1]}"] if scene.startswith("zero") else words
    words = ["model.args.proj_drop_rate=0.0"] if scene.startswith("world") else words  # dropout draws by rank
    result = train(load(sys.argv[1], [*words, f"name={scene}"]), resume=resume)
    AcceleratorState._reset_state(reset_partial_state=True)  # the process group stays
    if RANK == 0:
        print(f"{scene}: {result.status}", flush=True)


for scene in sys.argv[2:]:
    build.CleanImages = Interrupted if scene == "interrupted" else CleanImages
    run(scene)
    if scene == "interrupted":
        run(scene, resume=True)
end_process(0)
