"""`trilevel bench step CONFIG`: what a training step costs under each plan of a run, beside its dense control and plain timm.

Forward, backward and optimizer step on random images of the configured size, batch data.micro_batch, one process, no engine and
no loader; beside it the bookkeeping of examples. The whole run follows from the plateaus, weighted by their epochs and by the
examples each epoch shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import nn

from sparsity.types import DENSE
from sparsity.vit import SparseViT
from trainer.bench.bookkeeping import bookkeeping
from trainer.bench.bookkeeping import told as bookkeeping_told
from trainer.bench.paired import Row, paired
from trainer.config.run_config import Config
from trainer.model.build import build_model, cost_of
from trainer.model.optimizer import build_optimizer
from trainer.model.schedule import UNKNOWN, last_plan, stretches, whole_run


@dataclass(frozen=True)
class Measured:
    """rows: see `paired.paired`; `run` (with a schedule or examples left out): the whole run against `against`, beside its bound;
    `bookkeeping` (with a method of level 1): see there."""

    about: str
    rows: dict[str, Any]

    def table(self) -> Table:
        table = Table(title=self.about, title_justify="left")
        table.add_column("")
        for column in ("ms", "images/s", "of against", "95 % interval", "multiply-adds", "of timm", "peak MiB"):
            table.add_column(column, justify="right")
        for name, r in self.rows.items():
            if name not in ("run", "bookkeeping"):
                spread = f"{r['ratio_low']:.3f} - {r['ratio_high']:.3f}"
                share = f"{r['share']:.3f}" if r["share"] is not None else "-"
                table.add_row(
                    name, f"{r['median']:.2f}", f"{r['images_per_second']:.0f}", f"{r['ratio']:.3f}", spread, share,
                    f"{r['of_timm']:.3f}", f"{r['peak_mib']:.1f}",
                )  # fmt: skip
        return table

    def text(self) -> str:
        r = self.rows["run"]
        note = f"; {r['note']}" if r["note"] else ""
        dense = self.rows["against"]
        low, high = dense["of_timm_interval"]
        lines = [
            f"against / timm: {dense['of_timm']:.3f} ({low:.3f} - {high:.3f})",
            f"whole run: {r['median']:.3f} of against ({r['min']:.3f} - {r['max']:.3f}), bound {r['bound']:.3f} by multiply-adds; "
            f"examples left out are in both{note}",
        ]
        return "\n".join([*lines, bookkeeping_told(self.rows["bookkeeping"])] if "bookkeeping" in self.rows else lines)


def bench(config: Config, against: Config | None = None, pairs: int = 30) -> Measured:
    """Measure on this machine's GPU, or else its CPU (float32). against: another configuration at its final plan; None: the dense
    control of `config`. Raises ConfigError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config.model_copy(update={"model": config.model.model_copy(update={"init": "random"})})
    other = config if against is None else against
    other = other.model_copy(update={"model": other.model.model_copy(update={"init": "random"})})
    ours = build_model(config)  # one set of weights for all rows: where they lie in memory then favours none
    theirs, timm = SparseViT(ours.vit) if against is None else build_model(other), ours.vit
    for network, of in ((ours, config), (theirs, other), (timm, config)):
        _compile(network, of)
    final, base = last_plan(config), DENSE if against is None else last_plan(other)
    whole = cost_of(theirs, base)["multiply_adds"]
    named = {"ours": final} | {f"ours from epoch {start:g}": plan for start, plan in stretches(config) if plan != final}
    rows = {name: Row(ours, plan, cost_of(ours, plan)["multiply_adds"] / whole) for name, plan in named.items()}
    rows |= {"against": Row(theirs, base, 1.0), "timm": Row(timm, DENSE, cost_of(ours, DENSE)["multiply_adds"] / whole)}

    def progress(numbers: Iterable[int]) -> Iterable[int]:
        return track(list(numbers), description="rounds", transient=True)

    found = paired(
        rows, device, config.data.micro_batch, config.model.image_size, pairs, "against",
        precision=None if config.engine.precision == "float32" else torch.bfloat16,
        optimizer=lambda network: build_optimizer(network, config.optim), progress=progress,
    )  # fmt: skip
    of = {plan: found[name] for name, plan in named.items()}
    shares = {plan: rows[name].share or 1.0 for name, plan in named.items()}
    known = config.examples.method not in UNKNOWN
    ends = {"median": "ratio", "min": "ratio_low", "max": "ratio_high"}
    run: dict[str, Any] = {}
    for key, ratio in ends.items():
        run[key] = whole_run(config, {plan: row[ratio] for plan, row in of.items()}.__getitem__)
    run |= {"bound": whole_run(config, shares.__getitem__), "unit": "of against"}
    run |= {"cpu": device.type == "cpu", "threads": torch.get_num_threads()}  # `trilevel plan` asks
    found["run"] = run | {
        "note": "" if known else f"{config.examples.method} decides in the run what it leaves out: counted as nothing"
    }
    if config.examples.method != "all":
        found["bookkeeping"] = bookkeeping(config, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, float32"
    half = "bf16 autocast, " if device.type == "cuda" and config.engine.precision != "float32" else ""
    how = f"{half}{'compiled, ' if config.engine.compile else ''}{pairs} pairs, {where}"
    about = f"{config.name}: {config.model.name}, {config.model.image_size} px, batch {config.data.micro_batch}, {how}"
    return Measured(about, found)


def _compile(network: nn.Module, config: Config) -> None:
    if config.engine.compile:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)  # as in `Engine.prepare`
        network.compile()
