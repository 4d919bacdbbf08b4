"""A user's own DeepSpeed settings: a `ds_config.json` (`engine.deepspeed`), and the file of `accelerate launch --config_file`.

accelerate passes its file on through the environment (and a DeepSpeed file by name). Values that the configuration of the run
determines must be equal, "auto" or absent there, else the error names both. All other keys (buckets, overlap, offload, timers) are
passed to DeepSpeed unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.errors import ConfigError
from trainer.config.run_config import flat
from trainer.config.schema_run import EngineConfig

AUTO = "auto"
# Sections that duplicate the configuration of a run, or that the training loop does not support.
OURS = {
    "optimizer": "the optimizer is built from optim.*",
    "scheduler": "the learning rate is a function of progress, from optim.*",
    "fp16": "valid values of engine.precision: autocast (bf16), bf16, float32",
    "amp": "valid values of engine.precision: autocast (bf16), bf16, float32",
    "data_efficiency": "data and order are set by data.* and examples.*",
    "curriculum_learning": "data and order are set by data.* and examples.*",
    "progressive_layer_drop": "layers are dropped by model.drop_path",
    "elasticity": "a run is elastic by itself: any number of processes may resume it",
    "load_universal_checkpoint": "our checkpoints work for any number of processes without it",
    "compression_training": "the network is set by model.*, tokens.* and connections.*",
    "autotuning": "it starts runs of its own; use `trilevel bench engine`",
    "tensor_parallel": "only data parallelism is supported",
    "communication_data_type": "the precision of gradient sums is set by engine.precision",
    "data_types": "the precision of gradient sums is set by engine.precision",
    "quantize_training": "the network is set by model.*, tokens.* and connections.*",
    "sparse_gradients": "gradients are dense tensors",
    "eigenvalue": "the network is set by model.*, tokens.* and connections.*",
    "hybrid_engine": "it is for text generation",
    "pipeline": "only data parallelism is supported",
    "sequence_parallel_size": "only data parallelism is supported",
}
NEEDED = {  # options with one supported value
    "zero_optimization.compute_grad_norm": (True, "the norm is needed to detect non-finite steps"),
    "zero_optimization.zero_quantized_gradients": (False, "it changes the results of a run silently"),
    "zero_optimization.zero_quantized_weights": (False, "it changes the results of a run silently"),
    "bf16.bf16_master_weights_and_grads": (False, "engine.precision=bf16 keeps float32 master weights"),
    "torch_autocast.lower_precision_safe_modules": ([], "engine.precision=autocast uses torch's own list"),
    "bf16.check_grad_overflow": (True, "non-finite steps are skipped"),
    "managed_gradient_accumulation": (True, "micro-batches are counted by DeepSpeed"),
}
DECIDES = {  # {key of DeepSpeed: the setting that determines it}
    "train_batch_size": "data.batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.batch / data.micro_batch / processes: accumulation",
    "gradient_clipping": "optim.clip",
    "zero_optimization.stage": "engine.zero",
    "bf16.enabled": "engine.precision",
    "torch_autocast.enabled": "engine.precision",
    "torch_autocast.dtype": "engine.precision",
    "zero_allow_untested_optimizer": "optim.name",
}
FREE = frozenset(
    [
        "steps_per_print",
        "timers.throughput.enabled",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    ]
)
# accelerate's variables that are keys of DeepSpeed under another name
VARIABLES = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_optimization.stage",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "zero_optimization.offload_optimizer.nvme_path",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "zero_optimization.offload_param.nvme_path",
}
ELSEWHERE = {  # other ways to wrap a model: variable, its harmless value
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "none",
}


class ExternalSetting(NamedTuple):
    """A value for a key of DeepSpeed from outside the configuration, and its source."""

    where: str
    key: str
    value: Any


def merged(ours: dict[str, Any], settings: EngineConfig, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`ours` (see `deepspeed_config.deepspeed_config`) with the user's settings. Raises ConfigError with every conflict."""
    environment = os.environ if environment is None else environment
    config, wrong = json.loads(json.dumps(ours)), environment_conflicts(settings, environment)
    mine = flat(ours)
    given = external_settings(settings, environment) if settings.kind == "deepspeed" else []
    for one in given:
        if one.value == AUTO:
            continue
        section = one.key.split(".")[0]
        if section in OURS:
            off = one.key == f"{section}.enabled" and one.value in (False, 0)
            if not off and not _off(given, one.where, section):
                wrong.append(f"{one.where} has {one.key}={_text(one.value)}: {OURS[section]}")
        elif one.key in NEEDED and one.value != NEEDED[one.key][0]:
            wrong.append(f"{one.where} has {one.key}={_text(one.value)}: {NEEDED[one.key][1]}")
        elif one.key in mine and one.key not in FREE:
            if not _same(mine[one.key], one.value):
                wrong.append(f"{_setting(one.key, mine[one.key], settings)} but {one.where} has {one.key}={_text(one.value)}")
        elif any(key.startswith(f"{one.key}.") for key in mine):  # a whole section, not a key of it; {} sets nothing
            if one.value != {}:
                wrong.append(f"{one.where} has {one.key}={_text(one.value)}: its keys are set by the configuration")
        else:
            before = flat(config).get(one.key, one.value)
            if one.key not in FREE and not _same(before, one.value):
                first = next(other for other in given if other.key == one.key)
                wrong.append(f"{first.where} has {one.key}={_text(before)} but {one.where} has {_text(one.value)}")
            _put(config, one.key, one.value)
    if wrong:
        raise ConfigError(
            "settings of DeepSpeed or accelerate contradict the configuration: " + "; ".join(dict.fromkeys(wrong)) + ". Remove "
            'these keys there (or write "auto"), or change the setting in the configuration of the run'
        )
    return config


def external_settings(settings: EngineConfig, environment: Mapping[str, str]) -> list[ExternalSetting]:
    """The settings of the user's files and accelerate's variables, key by key."""
    found: list[ExternalSetting] = []
    files = {"engine.deepspeed": settings.deepspeed}
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        files["accelerate's deepspeed_config_file"] = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        for variable, key in VARIABLES.items():
            text = environment.get(variable)
            if text is not None and not (text == "none" and "offload" in key):
                found.append(ExternalSetting(f"accelerate ({variable})", key, _value(text)))
    for what, name in files.items():
        if name not in (None, "none"):
            found += [ExternalSetting(str(name), key, value) for key, value in flat(_read(str(name), what)).items()]
    return found


def environment_conflicts(settings: EngineConfig, environment: Mapping[str, str]) -> list[str]:
    """Conflicts with accelerate's environment other than keys of DeepSpeed."""
    wrong = []
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true" and settings.kind != "deepspeed":
        wrong.append(
            f"engine.kind={settings.kind} but accelerate has distributed_type=DEEPSPEED (ACCELERATE_USE_DEEPSPEED=true)"
        )
    if settings.deepspeed is not None and settings.kind != "deepspeed":
        wrong.append(f"engine.kind={settings.kind} but engine.deepspeed={settings.deepspeed}")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16") or (precision == "bf16" and settings.precision == "float32"):
        wrong.append(
            f"engine.precision={settings.precision} but accelerate has mixed_precision={precision} (ACCELERATE_MIXED_PRECISION)"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        compiled = str(settings.compile).lower()
        wrong.append(f"engine.compile={compiled} but accelerate has dynamo_backend={backend} (ACCELERATE_DYNAMO_BACKEND)")
    for variable, harmless in ELSEWHERE.items():
        if (value := environment.get(variable, harmless)).lower() != harmless:
            wrong.append(f"engine.kind={settings.kind} but accelerate has {variable}={value}")
    return wrong


def _read(name: str, what: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(name).read_text())
    except OSError as error:
        raise ConfigError(f"{what}={name}: {error.strerror}; give the path of a JSON file of DeepSpeed") from error
    except ValueError as error:
        raise ConfigError(f"{what}={name}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{what}={name}: must be a JSON object, got {type(content).__name__}")
    return content


def _off(given: list[ExternalSetting], where: str, section: str) -> bool:
    """Whether a section is present but disabled."""
    return any(one[:2] == (where, f"{section}.enabled") and one.value in (False, 0) for one in given)


def _setting(key: str, value: Any, settings: EngineConfig) -> str:
    name = DECIDES.get(key, key)
    return f"{name}={settings.precision if name == 'engine.precision' else _text(value)}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return float(one) == float(other)
    return one == other


def _value(text: str) -> Any:
    """An environment variable's text, parsed as JSON if possible."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value
