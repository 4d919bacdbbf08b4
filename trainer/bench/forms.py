"""The networks that `trilevel bench inference --forms` times: what is pruned, and a row for each form that the groups have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsity.vit import SparseViT
from sparsity.weights import compact
from sparsity.weights.gathered import gathered
from sparsity.weights.groups import Block
from sparsity.weights.pruning import Pruning
from sparsity.weights.stored import sizes
from trainer.bench.bsr import bsr
from trainer.bench.inference import Row
from trainer.bench.semi_structured import InBf16, semi_structured
from trainer.bench.semi_structured import refuse as semi_structured_here
from trainer.checkpoint import save_load
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.config.run_config import Config
from trainer.model import pruned_file, weights
from trainer.model.build import with_levels
from trainer.model.exported import AnyDensity

FORMS = ("dense", "compact", "block", "bsr", "2:4", "onnx", "onnx_int8")
ONNX = FORMS[5:]
IN_BF16 = "dense, bf16"  # the row beside 2:4, which is bf16 too


@dataclass(frozen=True)
class Pruned:
    """vit: timm's network on the CPU, with zeros where groups are pruned. level: with its masks. run: whose checkpoint it is; None: the
    weights are random."""

    config: Config
    vit: Any
    level: Pruning
    run: Path | None = None


def of_config(config: Config) -> Pruned:
    """Random weights, pruned by magnitude: times depend on how many groups are left, not on which. Raises ConfigError."""
    vit = _vit(config, weights.create(config.model.model_copy(update={"init": "random"}), config.seed).eval())
    level = config.weights.settings.build(vit)
    level.begin_epoch(config.epochs, lambda: dict(vit.named_parameters()))
    if level.kept is None:
        raise ConfigError(
            f"--forms with weights.method={config.weights.method}: nothing is pruned; set weights.keep below 1, e.g. "
            "weights.method=magnitude weights.keep=.5"
        )
    return _masked(config, vit, level, None)


def of_run(run: Path, overrides: Sequence[str] = ()) -> Pruned:
    """The newest checkpoint of a run, its EMA weights if it has any. Raises ConfigError for a run without one or without pruned weights."""
    what = f"bench inference {run} --forms"
    if fixed := next((one for one in overrides if one.partition("=")[0].partition(".")[0] in ("weights", "model")), None):
        raise ConfigError(
            f"{what}: {fixed}: the checkpoint has the masks and layers of its run; leave it out, or give a CONFIG"
        )
    config = load_run(run, list(overrides))
    found = save_load.latest(run / "checkpoints")
    if found is None:
        raise ConfigError(f"{what}: no checkpoint in it; give the directory of a run with one")
    level, vit = pruned_file.level_of(config, save_load.pruning_of(found), what)
    state = load_file(found / "ema.safetensors") or load_file(found / "weights.safetensors")
    vit.load_state_dict(state)
    return _masked(config, _vit(config, vit.eval()), level, run)


def reference(name: str, config: Config) -> Any:
    """The network of `--against timm:NAME`, with random weights and the image size and classes of `config`. Raises ConfigError."""
    if not name.startswith("timm:"):
        raise ConfigError(f"--against {name}: must be timm:NAME, e.g. timm:deit_small_patch16_224")
    weights.refuse_unknown(name.removeprefix("timm:"))
    model = {"name": name.removeprefix("timm:"), "init": "random", "args": {}}
    return _vit(config, weights.create(config.model.model_copy(update=model), config.seed).eval(), f"--against {name}")


def rows(
    found: Pruned, forms: Sequence[str], device: torch.device, folder: Path, against: Any, images: Iterable[np.ndarray]
) -> dict[str, Row]:
    """A row for the reference, named timm, and for each form; against: the reference, None: the dense network itself. images: normalised
    batches for the ranges of int8. folder: for files of ONNX. Raises ConfigError for a form that the groups do not have."""
    refuse(forms, device)
    model = SparseViT(found.vit)
    whole, left, bytes_ = model.cost(), model.cost(left=found.level.shares()), _bytes(found.vit)
    tokens = float(whole.tokens[-1])
    dense = Row(copy.deepcopy(found.vit).to(device), whole.total, tokens, bytes_)
    table = {"timm": dense}
    if against is not None:
        cost = SparseViT(against).cost()
        table = {"timm": Row(against.to(device), cost.total, float(cost.tokens[-1]), _bytes(against))}
    if "dense" in forms and against is not None:
        table["dense"] = dense
    build: dict[str, Callable[[], tuple[nn.Module, int]]] = {
        "compact": lambda: _sized(small(found)),
        "block": lambda: (gathered(found.vit, found.level), bytes_ - sizes(found.level)["dense"] + sizes(found.level)["block"]),
        "bsr": lambda: bsr(found.vit, found.level, found.config.weights.settings),
        "2:4": lambda: semi_structured(found.vit, found.level, device),
    }
    for form in build:
        if form in forms:
            try:
                network, size = build[form]()
            except ValueError as error:
                blocks = ("block", "bsr", "2:4") if device.type == "cuda" else ("block", "bsr")
                mine = blocks if all(isinstance(site, Block) for site in found.level.sites) else ("compact",)
                valid = ", ".join(one for one in FORMS if one not in build or one in mine)
                raise ConfigError(f"--forms {','.join(forms)}: {error}; valid forms of these groups: {valid}") from error
            network = network if form == "2:4" else network.to(device).eval()  # its tensors cannot be moved
            table[form] = Row(network, left.total, tokens, size)
    if "2:4" in forms:
        half = copy.deepcopy(found.vit).to(device, torch.bfloat16)
        table[IN_BF16] = Row(InBf16(half), whole.total, tokens, _bytes(half))
    if wanted := [form for form in forms if form in ONNX]:
        table |= _onnx(found, wanted, dense, left.total, folder, images)
    return table


def refuse(forms: Sequence[str], device: torch.device) -> None:
    """Raises ConfigError for unknown forms and for those that this device does not compute."""
    if wrong := next((form for form in forms if form not in FORMS), None):
        raise ConfigError(f"--forms: unknown value {wrong!r}; valid values: {', '.join(FORMS)}")
    if (given := [form for form in forms if form in ONNX]) and device.type == "cuda":
        raise ConfigError(f"--forms {','.join(given)}: onnxruntime is timed on a CPU; hide the GPU with CUDA_VISIBLE_DEVICES=")
    if "2:4" in forms:
        semi_structured_here(device)


def small(found: Pruned) -> Any:
    """A smaller dense copy. Raises ValueError for groups that leave none."""
    level, vit = found.level, found.vit
    assert level.kept is not None
    parts = compact.cut(level.sites, dict(vit.named_parameters()), level.kept)
    smaller = copy.deepcopy(vit)
    compact.shrink(smaller, compact.sizes_of(level.sites, level.kept))
    smaller.load_state_dict(vit.state_dict() | parts)
    return smaller.eval()


def _onnx(
    found: Pruned, forms: Sequence[str], dense: Row, left: float, folder: Path, images: Iterable[np.ndarray]
) -> dict[str, Row]:
    """Rows of onnxruntime, of the smaller network where the groups leave one, else of the network with its zeros: the files that
    `trilevel export RUN OUT.onnx --density 1` writes."""
    from trainer.checkpoint import export_onnx, onnx_int8

    export_onnx.refuse_missing()
    try:
        network, work = small(found), left
    except ValueError:
        network, work = found.vit, dense.gmacs
    paths = {form: folder / f"{form}.onnx" for form in ONNX}
    config, side = found.config, found.config.model.image_size
    whole = AnyDensity(with_levels(config, network), config.tokens, None, side, str(found.run or config.name))
    export_onnx.write(export_onnx.AtDensity(whole, 1.0).eval(), torch.zeros(2, 3, side, side), paths["onnx"])
    if "onnx_int8" in forms:
        onnx_int8.quantize(paths["onnx"], paths["onnx_int8"], images)
    table = {}
    for form in forms:
        run, lean = (partial(_run, onnx_int8.session(paths[form], arena=arena)) for arena in (True, False))
        table[form] = Row(run, work, dense.tokens, paths[form].stat().st_size, lean=lean)
    return table


def _run(session: Any, images: Tensor) -> Tensor:
    (logits,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


def _vit(config: Config, vit: Any, what: str = "") -> Any:
    if why := SparseViT.why_not(vit):
        raise ConfigError(f"{what or f'bench inference --forms: model.name={config.model.name}'}: {why}")
    return vit


def _masked(config: Config, vit: Any, level: Pruning, run: Path | None) -> Pruned:
    with torch.no_grad():
        for name, mask in level.masks().items():
            vit.get_parameter(name).mul_(mask)
    return Pruned(config, vit, level, run)


def _sized(network: nn.Module) -> tuple[nn.Module, int]:
    return network, _bytes(network)


def _bytes(network: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
