"""What DeepSpeed and accelerate are told, rendered from our configuration; and what the environment may not contradict."""

from __future__ import annotations

import os
from typing import Any

from trainer import sections as configuration
from trainer.data.order import Steps
from trainer.values import ConfigError


def deepspeed_config(settings: configuration.Engine, steps: Steps, world: int, clip: float) -> dict[str, Any]:
    """DeepSpeed's dictionary, rendered from ours; nothing is left to "auto"."""
    return {
        "train_micro_batch_size_per_gpu": steps.micro_batch,
        "gradient_accumulation_steps": steps.accumulation,
        "train_batch_size": steps.micro_batch * steps.accumulation * world,
        "gradient_clipping": clip,
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,  # timm's factory, not DeepSpeed's list
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": settings.zero,
            "stage3_gather_16bit_weights_on_model_save": settings.zero == 3,
        },
        "bf16": {"enabled": settings.precision == "bf16"},
        "torch_autocast": {"enabled": settings.precision == "autocast", "dtype": "bfloat16"},
    }


def refuse_conflicts(settings: configuration.Engine, steps: Steps) -> None:
    """What `accelerate launch --config_file` says through the environment must not contradict the configuration."""
    environment = os.environ
    pairs = []
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        if settings.kind != "deepspeed":
            pairs.append(("engine.kind", settings.kind, "ACCELERATE_USE_DEEPSPEED", "true"))
        pairs.append(
            (
                "engine.zero",
                settings.zero,
                "ACCELERATE_DEEPSPEED_ZERO_STAGE",
                environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
            )
        )
        given = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
        if given not in (None, "1"):
            pairs.append(
                (
                    "accumulation (from data.batch and data.micro_batch)",
                    steps.accumulation,
                    "gradient_accumulation_steps",
                    given,
                )
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16") or (precision == "bf16" and settings.precision == "float32"):
        pairs.append(("engine.precision", settings.precision, "ACCELERATE_MIXED_PRECISION", precision))
    wrong = [f"{ours}={a} but {theirs}={b}" for ours, a, theirs, b in pairs if b is not None and str(a) != str(b)]
    if wrong:
        raise ConfigError(
            "accelerate's settings contradict the configuration: "
            + "; ".join(wrong)
            + ". Change one of the two: the configuration "
            "file decides, accelerate's file only says where to run"
        )


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_of_node() -> bool:
    """Whether this process does what is needed once per node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def describe_world() -> None:
    """A plain `trilevel train` is a world of one: say so in the words torch.distributed reads."""
    if "WORLD_SIZE" in os.environ:
        return
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # port 0: bound where the system likes when the store opens; one asked for here could be another run's by then
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
