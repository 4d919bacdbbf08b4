"""`make gpu PART=step`: a training step of each row of the counts table, compiled, one row after the other; the prediction beside it.

Before, the graphs of all rows are compiled by several processes at once; the rows load them from torch's cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sparsity.attention_kernel import Kernels
from trainer.bench.gpu import compile_rows, counts
from trainer.bench.gpu.facts import timed
from trainer.bench.gpu.report import Facts, Host, Row
from trainer.config.load import load
from trainer.config.run_config import Config
from trainer.engine import attention_backend, cuda_graphs
from trainer.engine.graph_cache import cache_whole_graphs
from trainer.model.optimizer import build_optimizer
from trainer.storage.source_tree import SOURCE_ROOT
from trainer.telemetry.hardware import matrix_rate

CONFIG = "configs/tri_level_deit_small_0.7.yaml"
PREDICTED = "docs/results/gpu-counts.json"
ORDER = ("timm", "dense", "tokens 0.7", "tokens 0.5", "tokens 0.9", "dense, bf16 residual", "tokens 0.7, bf16 residual",
         "tokens 0.7, exact 0.1", "tokens 0.7, shared_keys 0.1", "ToMe 0.7")  # fmt: skip
FIRST = compile_rows.AT_ONCE  # rows that are compiled and measured before the others
FEW = {
    "dense, 32 images": ("dense", ("data.micro_batch=32",)),
    "dense, 32 images, CUDA graphs": ("dense", ("data.micro_batch=32", "engine.cuda_graphs=true")),
}
LAST = {"dense, autotune": ("dense", ("engine.autotune=true",))}  # compiled alone: it times kernels
PEAK = 989e12  # FLOP/s of an H200 in bf16
TINY = ("model.image_size=32", "model.args={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}", "tokens.blocks=[1]",
        "data.micro_batch=4", "data.batch=96")  # fmt: skip


def configured(host: Host, words: Sequence[str] = ()) -> Config:
    """The recipe that is measured; tiny: on a network of two blocks."""
    return load(SOURCE_ROOT / CONFIG, [*(TINY if host.tiny else ()), *words])


def part(host: Host) -> Iterator[Row]:
    torch.set_float32_matmul_precision("high")  # as in a run
    config, predicted = configured(host), _predictions(SOURCE_ROOT / PREDICTED)
    known: dict[str, float] = {}
    chosen: dict[tuple[int, bool], str] = {}
    yield "attention kernels", partial(_choose, host, config, chosen)
    for names in (ORDER[:3],) if host.tiny else (ORDER[:FIRST], ORDER[FIRST:]):
        if not host.tiny:
            later = [] if names[0] == ORDER[0] else list(FEW.values())
            wanted = [*((name, ()) for name in names), *later]
            yield f"graphs compiled, {len(wanted)} rows", partial(_compile, host, wanted, chosen)
        for name in names:
            yield name, partial(measured, host, config, name, known, predicted, chosen)
    for name, (row, words) in ({} if host.tiny else FEW | LAST).items():
        yield name, partial(measured, host, configured(host, words), row, {}, {}, chosen)


def _choose(host: Host, config: Config, chosen: dict[tuple[int, bool], str]) -> Facts:
    """For every attention of the rows the fastest kernel, as at the start of a run. One choice for all processes: graphs contain it."""
    shapes = {
        shape
        for name in ORDER
        if not (row := counts.rows()[name]).timm
        for shape in counts.network_of(config, row).attention_shapes(row.plan)
    }
    times = attention_backend.measured(host.device, config.data.micro_batch, shapes, torch.bfloat16)
    chosen |= attention_backend.fastest(times, shapes)
    return attention_backend.facts(times, chosen)


def _compile(host: Host, wanted: Sequence[tuple[str, Sequence[str]]], chosen: Kernels) -> Facts:
    return compile_rows.compiled([compile_rows.Request(*one, compile_rows.packed(chosen)) for one in wanted], host.device)


def measured(
    host: Host, config: Config, name: str, known: dict[str, float], predicted: dict[str, Any], kernels: Kernels | None = None
) -> Facts:
    """known: seconds of the rows before, to which this one is added. kernels: of the attention; None: they are timed here."""
    one, compiling, attention = step_of(host, config, counts.rows()[name], kernels)
    if host.on_gpu:
        torch.cuda.reset_peak_memory_stats(host.device)
    seconds = timed(one, host.device, 1 if host.tiny else 10, 1 if host.tiny else 4)
    known[name] = seconds
    images, about = config.data.micro_batch, predicted.get(name, {})
    facts: Facts = {"ms": 1000 * seconds, "images_per_second": images / seconds}
    facts |= {f"of_{other}": seconds / known[other] for other in ("timm", "dense") if other in known and other != name}
    flops = 0.0
    if about:
        # forward, twice that backward, two operations each
        flops, dense = (6 * images * _multiply_adds(config, row) for row in (name, "dense"))
        facts |= {
            "predicted_ms": about["predicted_ms"],
            "predicted_of_dense": about["of_dense"],
            "bound_of_dense": flops / dense,
        }
        facts |= {"mfu": flops / seconds / PEAK}
        facts |= {"terabytes_per_second": about["gigabytes"] / 1000 / seconds}
    if host.on_gpu:
        facts["peak_mib"] = torch.cuda.max_memory_allocated(host.device) / 2**20
    if about:  # after the peak, of which its matrices are no part
        facts["mfu_of_measured"] = flops / seconds / matrix_rate(host.device, "autocast")
    torch.compiler.reset()
    return facts | {"compile_s": compiling, "attention": attention}


def _multiply_adds(config: Config, name: str) -> float:
    """Of a forward pass of one image, without the tiles that a kernel fills up."""
    row = counts.rows()[name]
    return counts.network_of(config, row).cost(row.plan).total


def step_of(
    host: Host, config: Config, row: counts.Row, kernels: Kernels | None = None
) -> tuple[Callable[[], None], float, Any]:
    """A compiled step (forward, backward, optimizer) of a row's network, seconds of its first call, and its attention kernels, chosen as
    in a run unless they are given (timm's: torch's choice). tiny: not compiled."""
    model = counts.network_of(config, row, timms_drop_path=True).to(host.device)
    chosen: Any = "torch"
    if not row.timm:
        shapes = model.attention_shapes(row.plan)
        if kernels is None:
            times = attention_backend.measured(host.device, config.data.micro_batch, shapes, torch.bfloat16)
            kernels = attention_backend.fastest(times, shapes)
        model.kernels = {kind: name for kind, name in kernels.items() if kind in {shape.kind for shape in shapes}}
        chosen = attention_backend.facts({}, model.kernels)["attention"]
    optimizer = build_optimizer(model, config.optim)
    network: Any = model.network if row.timm else model
    if not host.tiny:
        cache_whole_graphs()
        network.compile(dynamic=False, **({"mode": mode} if (mode := cuda_graphs.mode_of(config.engine)) else {}))
    images, size = config.data.micro_batch, config.model.image_size
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(host.device)
    keys, labels = torch.arange(images, device=host.device), torch.arange(images, device=host.device) % 2

    def one() -> None:
        cuda_graphs.begin_pass(config.engine)
        with torch.autocast(host.device.type, torch.bfloat16):
            out = network(pixels) if row.timm else network(pixels, row.plan, frozenset(), keys).logits
        F.cross_entropy(out.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    started = time.perf_counter()
    one()
    if host.on_gpu:
        torch.cuda.synchronize(host.device)
    return one, time.perf_counter() - started, chosen


def _predictions(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
