"""A classifier of timm with its weights: timm's initialisation, timm's pretrained weights, or a file.

Files use timm's names: our files load into plain timm, and files of timm or of the papers' authors load here. Position embeddings and
patch kernels of another size are resampled by timm's functions, and every change is logged.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from trainer.config.errors import ConfigError, did_you_mean
from trainer.config.schema import ModelConfig
from trainer.journal.run_weights import run_weights
from trainer.model import heads, stored_form
from trainer.model.thresholds import header
from trainer.storage.disk import atomic_write, counted
from trainer.storage.safetensors_stream import pieces

PREFIXES = (
    "module.",
    "_orig_mod.",
    "network.",
    "vit.",
)  # DDP and DeepSpeed, torch.compile, SparseNetwork and its name before 0.2
AVERAGES = ("state_dict_ema", "model_ema")
NESTED = (*AVERAGES, "state_dict", "model")  # keys under which training scripts save the weights; averages first, as in timm
log_warning = logging.getLogger(__name__).warning


def create(settings: ModelConfig, seed: int = 0, warn: Callable[[str], None] = log_warning) -> nn.Module:
    """The network of a run on the CPU, float32; `seed` keys the random initialisation, the only random draw.

    `warn` is called with a text for each tensor that was resized or reset. Raises ConfigError for a model or arguments unknown to
    timm, and weights that do not fit.
    """
    model = build(settings, seed, pretrained=settings.init == "timm")
    if settings.init != "random":
        heads.refuse_other(model, settings, settings.init, f"model.init={settings.init}")
    if settings.init == "timm":
        own = about(model)
        for what, theirs, ours in (
            ("head", own.get("num_classes"), settings.classes),
            ("position embedding", (own.get("input_size") or (0,))[-1], settings.image_size),
        ):
            if theirs != ours:
                verb = "was reset" if what == "head" else "was resized"
                warn(f"model.init=timm: {what} {verb}: {settings.name} was trained with {theirs}, this run has {ours}")
    elif settings.init != "random":
        fit(model, weights_at(settings.init, "model.init", settings.args), f"model.init={settings.init}", warn)
    return model


TOO_LARGE = ("allocate memory", "Storage size calculation overflowed")  # torch's words on the CPU


def build(settings: ModelConfig, seed: int, pretrained: bool = False, section: str = "model") -> nn.Module:
    """`timm.create_model` from `ModelConfig`, with timm's initialisation drawn from `seed`; the global generator is restored.
    section: that of the configuration, for messages."""
    refuse_unknown(settings.name, section)
    named = {"num_classes": settings.classes, "img_size": settings.image_size, "drop_path_rate": settings.drop_path}
    if not fixes_image_size(settings.name):
        named.pop("img_size")
    twice = named.keys() & settings.args.keys()
    if twice:
        keys = {"num_classes": "model.classes", "img_size": "model.image_size", "drop_path_rate": "model.drop_path"}
        raise ConfigError("; ".join(f"{section}.args.{key}: set {keys[key]} instead" for key in sorted(twice)))
    try:
        with seeded(seed):
            model = _created(settings, pretrained, named)
    except (TypeError, AttributeError, AssertionError, KeyError) as error:
        raise ConfigError(
            f"{section}.name={settings.name} with {section}.args={settings.args}: rejected by timm: {error}"
        ) from error
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in TOO_LARGE):
            raise ConfigError(
                f"{section}.name={settings.name} with model.image_size={settings.image_size}, model.classes={settings.classes} and "
                f"{section}.args={settings.args} does not fit into memory: {_first_line(error)}; use smaller values"
            ) from error
        if not pretrained:
            raise
        key = "model.init" if section == "model" else f"{section}.from"
        raise ConfigError(
            f"{key}=timm: cannot download weights of {settings.name} ({_first_line(error)}); download them elsewhere and "
            f"set {key}=PATH"
        ) from error
    return model


def fixes_image_size(name: str) -> bool:
    """Whether timm builds this network for one image size (`img_size`), as transformers; convolutional networks take any."""
    return bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))


def _created(settings: ModelConfig, pretrained: bool, named: dict[str, Any]) -> nn.Module:
    """`timm.create_model`; networks without drop path do not take its rate."""
    try:
        return timm.create_model(settings.name, pretrained=pretrained, **named, **settings.args)
    except TypeError as error:
        if "'drop_path_rate'" not in str(error):
            raise
        if settings.drop_path > 0:
            raise ConfigError(
                f"model.drop_path={settings.drop_path:g}: model.name={settings.name} has no drop path; set model.drop_path=0"
            ) from error
    given = {key: value for key, value in named.items() if key != "drop_path_rate"}
    return timm.create_model(settings.name, pretrained=pretrained, **given, **settings.args)


def refuse_unknown(name: str, section: str = "model") -> None:
    """Raise ConfigError, with similar names, for a model unknown to timm."""
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), number=3) or "timm.list_models('*vit*') lists them"
        raise ConfigError(f"{section}.name={name!r}: unknown model of timm {timm.__version__}; {hint}")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator, used by timm's initialisation, for the context; restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def fit(model: nn.Module, state: Mapping[str, Tensor], source: str, warn: Callable[[str], None] = log_warning) -> list[str]:
    """Load `state` (timm's or the authors' names) into `model`, calling `warn` for each tensor that is resized or reset; returns the
    names of those that were reset.

    Position embedding and patch kernel are resampled (timm's bicubic); a head with another number of classes, or without weights
    in the file, keeps its initialisation. Raises ConfigError naming every other tensor that is missing, unknown, or of another
    shape.
    """
    before = to_timm(state)
    try:
        after = _resized(dict(before), model)
    except Exception as error:  # timm resamples what has the name of a position embedding or a patch kernel, of whatever shape
        raise ConfigError(f"{source} does not fit this model: timm can't resize its tensors ({_first_line(error)})") from error
    wanted = model.state_dict()
    for name in after.keys() & before.keys():
        if after[name].shape != before[name].shape:
            warn(f"{source}: {name} was resized from {list(before[name].shape)} to {list(after[name].shape)}")
    heads = [name for name in wanted if name.split(".")[0] in _heads(model)]
    reset = [name for name in heads if name not in after or after[name].shape != wanted[name].shape]
    if reset:
        had = {name: list(after[name].shape) if name in after else "nothing" for name in reset}
        warn(
            f"{source}: {', '.join(reset)} reset to their initialisation: the file has {had}, this model {model.num_classes} classes"
        )
    kept = {name: value for name, value in after.items() if name not in reset}
    wrong = [f"{name}: missing in the file" for name in wanted if name not in kept and name not in reset]
    for name, value in kept.items():
        if name not in wanted:
            hint = did_you_mean(name, wanted)
            wrong.append(f"{name}: unknown to the model" + (f"; {hint}" if hint else ""))
        elif value.shape != wanted[name].shape:
            wrong.append(f"{name}: {list(value.shape)} in the file, {list(wanted[name].shape)} in the model")
    if wrong:
        more = f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ConfigError(f"{source} does not fit this model:\n  " + "\n  ".join(wrong[:8]) + more)
    model.load_state_dict(kept, strict=False)  # all names but the heads' were checked above
    return reset


def _resized(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's own filter for weights of this kind of network, which resamples what depends on the image size; without one, as they are."""
    if isinstance(model, VisionTransformer):
        return checkpoint_filter_fn(state, model, adapt_layer_scale=True)
    filtered = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state if filtered is None else filtered(state, model)


def about(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg`: classes, input size, pixel statistics and heads of the pretrained weights."""
    return cast(dict[str, Any], model.pretrained_cfg)


def _heads(model: nn.Module) -> set[str]:
    names = about(model).get("classifier") or "head"
    return {name.split(".")[0] for name in ([names] if isinstance(names, str) else names)}


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with timm's names: prefixes of wrappers are removed if all names have them, in any order."""
    names = list(state)
    while found := next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(found) for name in names]
    return dict(zip(names, state.values(), strict=True))


def save_weights(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors under timm's names, with `metadata` in the header; after a crash the file is complete, or the previous one."""
    with atomic_write(path) as file:
        file.writelines(counted(pieces({name: value.cpu() for name, value in to_timm(state).items()}, metadata or {})))


def weights_at(path: str | Path, key: str, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a weights file, or of a run's directory, whose file must be the one that its journal names; see
    `stored_form.started_from`. key: of the configuration, for messages. args: of its network. Raises ConfigError."""
    if Path(path).is_dir():
        return _finite(load_weights(run_weights(path, f"{key}={path}")), f"{key}={path}")
    state, path = _finite(load_weights(path), f"{key}={path}"), Path(path)
    return stored_form.started_from(state, header(path) if path.suffix == ".safetensors" else {}, path, key, args)


def _finite(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    for name, value in state.items():
        if value.is_floating_point() and not (fine := value.float().isfinite()).all():
            raise ConfigError(
                f"{source}: {int((~fine).sum())} values of {name} are not finite; use weights from before they were"
            )
    return state


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or PyTorch file by timm's names, on the CPU. Never executes pickled code. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = did_you_mean(path.name, [p.name for p in folder.iterdir()], prefix=f"{folder}/" if folder.parts else "")
        hint = near or "give 'timm', the path of a weights file or the directory of a run"
        raise ConfigError(f"weights {path}: no such file; {hint}")
    try:
        if path.suffix == ".safetensors":
            return to_timm(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise nearly every class in these readers, UnicodeDecodeError and IndexError too
        why = (
            "it holds pickled objects, e.g. a whole module" if "Weights only load failed" in str(error) else _first_line(error)
        )
        raise ConfigError(
            f"weights {path}: cannot be read as tensors ({why}); if you trust it, save its state_dict, or convert it to safetensors"
        ) from error
    return to_timm(_tensors(content, path))


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in a file of a training script."""
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(
            f"weights {path}: no dictionary of tensors found at top level or under {', '.join(NESTED)}; save a state_dict"
        )
    for name, value in content.items():
        if not isinstance(name, str):
            raise ConfigError(f"weights {path}: the key {name!r:.80} is not text; save a state_dict")
        if value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
            raise ConfigError(f"weights {path}: {name:.200} is not a dense tensor of real numbers; save a state_dict of those")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
