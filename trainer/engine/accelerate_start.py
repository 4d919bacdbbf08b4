"""accelerate's start: an Accelerator with as many processes as the launcher started, and DeepSpeed's settings for it. Its release allows
another engine in this process."""

from __future__ import annotations

import os
from typing import Any

from trainer.config.schema_run import EngineConfig
from trainer.engine.environment import world_size
from trainer.engine.errors import EngineError
from trainer.engine.heartbeat import backstop

PREFIX = "ACCELERATE_"  # of the environment variables that accelerate reads and sets


def variables() -> dict[str, str]:
    """accelerate's variables, as they are now; for `release`."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def deepspeed_plugin(rendered: dict[str, Any], on_gpu: bool) -> Any:
    """accelerate's holder of a DeepSpeed configuration; the variables that contradict it are removed."""
    from accelerate.utils import DeepSpeedPlugin

    if not on_gpu:
        # DeepSpeed would compile an all-reduce over shared memory at its first start, under one lock for all runs of a user, which wait for
        # each other silently (minutes, as measured). gloo computes the same sums.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # with ACCELERATE_USE_CPU accelerate ignores DeepSpeed (state.py: "and not cpu") and wraps in DDP; it detects the CPU itself
    os.environ.pop("ACCELERATE_USE_CPU", None)
    # accelerate raises if its file and a DeepSpeed file set the same key, even to equal values; `deepspeed_config` compared them
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    plugin = DeepSpeedPlugin(hf_ds_config=rendered)
    plugin.deepspeed_config |= {"steps_per_print": rendered["steps_per_print"]}  # accelerate sets its own value
    return plugin


def accelerator(settings: EngineConfig, on_gpu: bool, plugin: Any) -> Any:
    """accelerate's Accelerator, which starts the process group where there is none. Raises EngineError if it counts a different number of
    processes than the launcher started (on CPUs that happens silently: every rank trains alone and checkpoints collide)."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    limit = backstop(settings.timeout, settings.start_timeout)
    found = Accelerator(
        cpu=not on_gpu and settings.kind == "ddp",
        mixed_precision="no",  # DeepSpeed's own modes are used; see `deepspeed_config`
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=limit)],
    )
    if found.num_processes != (expected := world_size()):
        raise EngineError(
            f"WORLD_SIZE={expected}, but accelerate counts {found.num_processes} process(es): every rank would train "
            "alone and checkpoints would collide. Start with `python -m launch local`, torchrun, or `accelerate "
            "launch --multi_gpu --num_processes N` (on CPUs too: its --cpu starts one process)"
        )
    return found


def release(before: dict[str, str]) -> None:
    """Reset accelerate's singletons and set its variables to those from before its start. The process group stays."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in variables():
        del os.environ[name]
    os.environ |= before
