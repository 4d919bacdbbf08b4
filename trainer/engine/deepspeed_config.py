"""DeepSpeed's configuration, rendered from the configuration of the run and the number of processes."""

from __future__ import annotations

from typing import Any

from trainer.config.schema_run import EngineConfig
from trainer.data.order import BatchSplit
from trainer.engine.deepspeed_conflicts import merged


def deepspeed_config(settings: EngineConfig, batch_split: BatchSplit, world: int, clip: float) -> dict[str, Any]:
    """DeepSpeed's dictionary: rendered from ours, without "auto", plus the user's own settings (see `deepspeed_conflicts`).

    Raises ConfigError with both values if the user's files or accelerate's environment contradict the configuration.
    """
    ours = {
        "train_micro_batch_size_per_gpu": batch_split.micro_batch,
        "gradient_accumulation_steps": batch_split.accumulation,
        "train_batch_size": batch_split.micro_batch * batch_split.accumulation * world,
        "gradient_clipping": clip,
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,  # timm's factory, not DeepSpeed's list
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": settings.zero,
            "stage3_gather_16bit_weights_on_model_save": settings.zero == 3,
        },
        "bf16": {"enabled": settings.precision == "bf16"},
        # no module: by default linear and convolutional layers sum their gradients, and under ZeRO 3 gather their weights, in bf16; a
        # resume then continued from weights that the run had never used
        "torch_autocast": {
            "enabled": settings.precision == "autocast",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    return merged(ours, settings)
