"""Settings that are not read beside the others of a run: a sentence for each, with key, value and the setting that would read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from trainer.config.run_config import Config
from trainer.model.optimizer import has_betas, has_setting


def unread(config: Config) -> Iterator[str]:
    """Keys of other choices in their section. A stored configuration has every key, so those with their defaults are not reported."""
    engine, augment, optim, trace = config.engine, config.augment, config.optim, config.trace
    if engine.kind == "ddp":
        if engine.zero > _default(engine, "zero"):
            yield f"engine.zero={engine.zero} has no effect with engine.kind=ddp; set engine.zero=0 or engine.kind=deepspeed"
        if engine.deepspeed is not None:
            yield f"engine.deepspeed={engine.deepspeed} has no effect with engine.kind=ddp; set engine.kind=deepspeed"
    if engine.autotune and not engine.compile:
        yield "engine.autotune=true has no effect with engine.compile=false; set engine.compile=true"
    if trace.steps is None:
        for key in ("memory", "ranks"):
            if (value := getattr(trace, key)) != _default(trace, key):
                yield f"trace.{key}={plain_text(value)} has no effect without trace.steps; set it to the first and last step"
    if not (augment.mixup and augment.cutmix) and augment.mix_switch != _default(augment, "mix_switch"):
        yield f"augment.mix_switch={augment.mix_switch:g} has no effect unless augment.mixup and augment.cutmix are both above 0"
    if not (augment.mixup or augment.cutmix) and augment.mix_probability != _default(augment, "mix_probability"):
        yield f"augment.mix_probability={augment.mix_probability:g} has no effect without augment.mixup or augment.cutmix"
    if augment.policy_on == "device" and augment.policy == "none" and not augment.color_jitter:
        yield "augment.policy_on=device has no effect with augment.policy=none and augment.color_jitter=0; set one of them"
    if augment.crop != "shift" and augment.shift:
        yield f"augment.shift={augment.shift} has no effect with augment.crop={augment.crop}; set augment.crop=shift"
    for key in ("scale", "ratio"):
        if augment.crop != "rrc" and (value := getattr(augment, key)) != _default(augment, key):
            yield f"augment.{key}={plain_text(value)} has no effect with augment.crop={augment.crop}; set augment.crop=rrc"
    if optim.betas != _default(optim, "betas") and not has_betas(optim.name):
        yield f"optim.betas={plain_text(optim.betas)} has no effect with optim.name={optim.name}, which has no betas"
    if optim.eps != _default(optim, "eps") and not has_setting(optim.name, "eps"):
        yield f"optim.eps={optim.eps:g} has no effect with optim.name={optim.name}, which has no eps"
    if optim.warmup == 0 and optim.warmup_lr != _default(optim, "warmup_lr"):
        yield f"optim.warmup_lr={optim.warmup_lr:g} has no effect with optim.warmup=0ep; set optim.warmup"


def _default(section: BaseModel, key: str) -> Any:
    return type(section).model_fields[key].default


def plain_text(value: Any) -> str:
    """As in YAML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
