"""`trilevel bench inference CONFIG --forms compact,block`: images/s of pruned networks in the forms they have, beside timm's dense model.

The groups are chosen by magnitude from random weights: times depend on how many are left, not on which. Every token is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

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

FORMS = ("dense", "compact", "block")


def bench(config: Config, forms: Sequence[str], batches: list[int], rounds: int) -> BenchResult:
    """Measure on this machine's GPU, or else its CPU (float32). Raises ConfigError for a form that the groups of `config` do not have."""
    if wrong := next((form for form in forms if form not in FORMS), None):
        raise ConfigError(f"--forms: unknown value {wrong!r}; valid values: {', '.join(FORMS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    rows = _rows(vit, level, forms, device)
    found: dict[str, dict[str, Any]] = {}
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
    return BenchResult(title, found, COLUMNS, notes)


def _rows(vit: Any, level: Pruning, forms: Sequence[str], device: torch.device) -> dict[str, Row]:
    assert level.kept is not None
    model = SparseViT(vit)
    whole, left = model.cost(), model.cost(left=level.shares())
    tokens = float(whole.tokens[-1])
    rows = {"timm": Row(vit.to(device), whole.total, tokens)}
    try:
        if "compact" in forms:
            small = copy.deepcopy(vit)
            parts = compact.cut(level.sites, dict(vit.named_parameters()), level.kept)
            compact.shrink(small, compact.sizes_of(level.sites, level.kept))
            small.load_state_dict(vit.state_dict() | parts)
            rows["compact"] = Row(small.to(device).eval(), left.total, tokens)
        if "block" in forms:
            rows["block"] = Row(gathered(vit, level).to(device).eval(), left.total, tokens)
    except ValueError as error:
        raise ConfigError(f"--forms {','.join(forms)}: {error}") from error
    return rows
