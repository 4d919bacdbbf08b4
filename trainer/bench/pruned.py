"""`trilevel bench inference CONFIG --forms compact,block`: images/s of pruned networks in the forms they have, beside timm's dense model.

The groups are chosen by magnitude from random weights: times depend on how many are left, not on which. Every token is kept. The ONNX
rows are those of onnxruntime on a CPU, of the smaller network where the groups leave one, else of the dense network with its zeros.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.vit import SparseViT
from sparsity.weights import compact
from sparsity.weights.gathered import gathered
from sparsity.weights.pruning import Pruning
from sparsity.weights.stored import sizes
from trainer.bench.inference import COLUMNS, Row, measured
from trainer.bench.result import BenchResult
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.model import weights

FORMS = ("dense", "compact", "block", "onnx", "onnx_int8")
ONNX = FORMS[3:]
CALIBRATED = 32  # random images for the ranges of int8: times do not depend on them
FORM_COLUMNS = COLUMNS | {"bytes": "{bytes:,}"}


def bench(config: Config, forms: Sequence[str], batches: list[int], rounds: int) -> BenchResult:
    """Measure on this machine's GPU, or else its CPU (float32). Raises ConfigError for a form that the groups of `config` do not have."""
    if wrong := next((form for form in forms if form not in FORMS), None):
        raise ConfigError(f"--forms: unknown value {wrong!r}; valid values: {', '.join(FORMS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (given := [form for form in forms if form in ONNX]) and device.type == "cuda":
        raise ConfigError(f"--forms {','.join(given)}: onnxruntime is timed on a CPU; hide the GPU with CUDA_VISIBLE_DEVICES=")
    vit: Any = weights.create(config.model.model_copy(update={"init": "random"}), config.seed).eval()
    if why := SparseViT.why_not(vit):
        raise ConfigError(f"bench inference --forms: model.name={config.model.name}: {why}")
    level = config.weights.settings.build(vit)
    level.begin_epoch(config.epochs, lambda: dict(vit.named_parameters()))
    if level.kept is None:
        raise ConfigError(
            f"--forms with weights.method={config.weights.method}: nothing is pruned; set weights.keep below 1, e.g. "
            "weights.method=magnitude weights.keep=.5"
        )
    with torch.no_grad():
        for name, mask in level.masks().items():
            vit.get_parameter(name).mul_(mask)
    half = device.type == "cuda" and config.engine.precision != "float32"
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="trilevel-forms-") as folder:
        rows = _rows(vit, level, forms, device, Path(folder))
        for batch in batches:
            images = torch.randn(batch, 3, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(0)).to(device)
            found |= {f"{batch} x {name}": facts for name, facts in measured(rows, images, rounds, half, batch).items()}
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, float32"
    left = sizes(level)
    s: Any = config.weights.settings
    title = (
        f"{config.model.name}, {config.model.image_size} px, weights.groups={s.groups}, block={list(s.block)}, keep={s.keep:g}, eager, "
        f"{'bf16 autocast, ' if half else ''}{rounds} rounds, {kind}"
    )
    notes = [
        "row: batch size x network. bound: speedup if time followed multiply-adds.",
        f"bytes of the pruned layers, float32: dense {left['dense']:,}, blocks {left['block']:,}, CSR {left['csr']:,}.",
    ]
    return BenchResult(title, found, FORM_COLUMNS, notes)


def _rows(vit: Any, level: Pruning, forms: Sequence[str], device: torch.device, folder: Path) -> dict[str, Row]:
    assert level.kept is not None
    model = SparseViT(vit)
    whole, left = model.cost(), model.cost(left=level.shares())
    tokens, dense = float(whole.tokens[-1]), _bytes(vit)
    rows = {"timm": Row(vit.to(device), whole.total, tokens, dense)}
    try:
        if "compact" in forms:
            small = _compact(vit, level)
            rows["compact"] = Row(small.to(device), left.total, tokens, _bytes(small))
        if "block" in forms:
            stored = sizes(level)
            rows["block"] = Row(
                gathered(vit, level).to(device).eval(), left.total, tokens, dense - stored["dense"] + stored["block"]
            )
    except ValueError as error:
        raise ConfigError(f"--forms {','.join(forms)}: {error}") from error
    if wanted := [form for form in forms if form in ONNX]:
        rows |= _onnx(vit, level, wanted, Row(vit, whole.total, tokens), left.total, folder)
    return rows


def _compact(vit: Any, level: Pruning) -> Any:
    """A smaller dense copy. Raises ValueError for groups that leave none."""
    assert level.kept is not None
    parts = compact.cut(level.sites, dict(vit.named_parameters()), level.kept)
    small = copy.deepcopy(vit)
    compact.shrink(small, compact.sizes_of(level.sites, level.kept))
    small.load_state_dict(vit.state_dict() | parts)
    return small.eval()


def _onnx(vit: Any, level: Pruning, forms: Sequence[str], dense: Row, left: float, folder: Path) -> dict[str, Row]:
    """Rows of onnxruntime; dense: of the network with its zeros; left: multiply-adds of the smaller one."""
    from trainer.checkpoint import export_onnx, onnx_int8

    export_onnx.refuse_missing()
    try:
        network, work = _compact(vit, level), left
    except ValueError:
        network, work = vit, dense.gmacs
    size = vit.patch_embed.img_size
    paths = {form: folder / f"{form}.onnx" for form in ONNX}
    export_onnx.write(network, torch.zeros(2, 3, *size), paths["onnx"])
    if "onnx_int8" in forms:
        images = torch.randn(CALIBRATED, 3, *size, generator=torch.Generator().manual_seed(1))
        onnx_int8.quantize(paths["onnx"], paths["onnx_int8"], [part.numpy() for part in images.split(8)])
    found = {}
    for form in forms:
        run = partial(_run, onnx_int8.session(paths[form]))
        found[form] = Row(run, work, dense.tokens, paths[form].stat().st_size, by_torch=False)
    return found


def _run(session: Any, images: Tensor) -> Any:
    return session.run(None, {"images": images.numpy()})


def _bytes(network: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
