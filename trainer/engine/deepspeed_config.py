"""DeepSpeed's configuration, rendered from the configuration of the run and the number of processes."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.config.schema_run import EngineConfig
from trainer.data.order import BatchSplit
from trainer.engine.deepspeed_conflicts import merged

DEFAULT_BUCKET = 500_000_000  # of DeepSpeed, in numbers


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
        # it synchronises the device twice in each step; the run has meters of its own
        "timers": {"throughput": {"enabled": False}},
    }
    found = merged(ours, settings)
    if settings.zero == 0:  # our engine clips: DeepSpeed's own copies two numbers to the device and waits for them
        found["gradient_clipping"] = 0.0
    return found


def fit_buckets(config: dict[str, Any], model: nn.Module) -> None:
    """Make ZeRO's buffer of gradients as large as the model, in place, unless the user chose its size: DeepSpeed's default, 5e8 numbers per
    type of gradient, takes 1 to 4 GB in each step, and every bucket that is larger than the model is one bucket anyway."""
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stage = config["zero_optimization"]
    if stage["stage"] > 0 and size <= DEFAULT_BUCKET:
        stage.setdefault("reduce_bucket_size", max(size, 1))
