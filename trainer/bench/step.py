"""`trilevel bench step CONFIG`: step time under each plan of a run, compared with its dense baseline and timm's model.

Forward, backward and optimizer step on random images of the configured size, batch data.micro_batch, one process, without engine
and loader; also the bookkeeping of examples. The estimate for the whole run weights the plateaus by their epochs and by the
examples each epoch shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsity.types import DENSE
from trainer.bench.bookkeeping import bookkeeping
from trainer.bench.bookkeeping import describe as describe_bookkeeping
from trainer.bench.paired import TimedPlan, paired
from trainer.bench.result import BenchResult
from trainer.config.run_config import Config
from trainer.model.build import build_model, build_schedule, cost_of
from trainer.model.optimizer import build_optimizer
from trainer.model.schedule import row_of

COLUMNS = {
    "ms": "{median:.2f}",
    "images/s": "{images_per_second:.0f}",
    "of against": "{ratio:.3f}",
    "95 % interval": "{ratio_low:.3f} - {ratio_high:.3f}",
    "multiply-adds": "{share:.3f}",
    "of timm": "{of_timm:.3f}",
    "peak MiB": "{peak_mib:.1f}",
}


def bench(config: Config, against: Config | None = None, pairs: int = 30) -> BenchResult:
    """Measure on this machine's GPU, or else its CPU (float32). against: another configuration at its final plan; None: the dense
    baseline of `config`. Raises ConfigError.

    Rows: see `paired.paired`. In JSON also `run`: the whole run relative to `against`, and its bound by multiply-adds; with a method
    of level 1 `bookkeeping`: see there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # as in `train`; on a CPU the rows are float32
        torch.set_float32_matmul_precision("highest" if config.engine.precision == "float32" else "high")
    config = config.without_teacher().changed(model={"init": "random"})
    other = config if against is None else against.without_teacher().changed(model={"init": "random"})
    ours = build_model(config)  # one set of weights for all rows, so that memory placement favours none
    theirs, timm = ours.dense() if against is None else build_model(other), ours.network
    for network, of in ((ours, config), (theirs, other), (timm, config)):
        compile_network(network, of)
    schedule = build_schedule(config)
    final, base = schedule.last(), DENSE if against is None else build_schedule(other).last()
    whole = cost_of(theirs, base)["multiply_adds"]
    named = {"ours": final} | {row_of(stretch, final): stretch.plan for stretch in schedule.stretches()}
    rows = {name: TimedPlan(ours, plan, cost_of(ours, plan)["multiply_adds"] / whole) for name, plan in named.items()}
    rows |= {
        "against": TimedPlan(theirs, base, 1.0),
        "timm": TimedPlan(timm, DENSE, cost_of(ours, DENSE)["multiply_adds"] / whole),
    }
    found = paired(
        rows, device, config.data.micro_batch, config.model.image_size, pairs, "against",
        precision=None if config.engine.precision == "float32" else torch.bfloat16,
        optimizer=lambda network: build_optimizer(network, config.optim), show=f"bench step {config.name}",
    )  # fmt: skip
    measured = {plan: found[name] | {"bound": rows[name].share} for name, plan in named.items()}
    ends = {"median": "ratio", "min": "ratio_low", "max": "ratio_high", "bound": "bound"}
    run = {key: schedule.mean(lambda plan, field=field: measured[plan][field]) for key, field in ends.items()}
    note = (
        "" if schedule.shares_known else f"{config.examples.method} decides in the run what it leaves out: counted as nothing"
    )
    beside: dict[str, dict[str, Any]] = {"run": run | {"unit": "of against", "note": note}}
    beside["run"] |= {"cpu": device.type == "cpu", "threads": torch.get_num_threads()}  # `trilevel estimate` reads them
    notes = [
        "against / timm: {of_timm:.3f} ({of_timm_interval[0]:.3f} - {of_timm_interval[1]:.3f})".format_map(found["against"]),
        "whole run: {median:.3f} of against ({min:.3f} - {max:.3f}), bound {bound:.3f} by multiply-adds; both count removed "
        "examples".format_map(run) + (f"; {note}" if note else ""),
    ]  # fmt: skip
    if not config.examples.settings.off:
        beside["bookkeeping"] = bookkeeping(config, device)
        notes.append(describe_bookkeeping(beside["bookkeeping"]))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, float32"
    half = "bf16 autocast, " if device.type == "cuda" and config.engine.precision != "float32" else ""
    how = f"{half}{'compiled, ' if config.engine.compile else ''}{pairs} pairs, {where}"
    title = f"{config.name}: {config.model.name}, {config.model.image_size} px, batch {config.data.micro_batch}, {how}"
    return BenchResult(title, found, COLUMNS, notes, beside)


def compile_network(network: nn.Module, config: Config) -> None:
    """As the run would, in place; nothing without `engine.compile`."""
    if config.engine.compile:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)  # as in `Engine.prepare`
        network.compile()
