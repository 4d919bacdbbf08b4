"""The handler of `trilevel bench PART`. Each part is a module of `trainer/bench/`, imported when it is used."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli.output import configuration, show, show_table, write_json
from trainer.config.errors import ConfigError

if TYPE_CHECKING:
    from trainer.bench.result import BenchResult

PARTS = ("input", "step", "study", "inference", "checkpoint", "engine", "journal", "remote", "gpu-counts")
COUNTS = ("rounds", "pairs", "passes", "saves", "lines", "batch", "limit", "processes", "shards", "world")  # options, all >= 1


def bench(a: argparse.Namespace) -> None:
    """Measure; on rank 0 print title, table and notes, and write the JSON file. Raises ConfigError."""
    part = a.command.removeprefix("bench ")
    for name in COUNTS:
        if (number := getattr(a, name, None)) is not None and number < 1:
            raise ConfigError(f"bench {part}: --{name} {number}: must be >= 1")
    result = _measured(part, a)
    if result is not None and os.environ.get("RANK", "0") == "0":
        show(result.title)
        show_table(result.table())
        show("\n".join(result.notes))
        write_json(a.json, result.facts())


def _measured(part: str, a: argparse.Namespace) -> BenchResult | None:
    if part == "journal":
        from trainer.bench import journal

        return journal.bench(a.lines, a.pause)
    if part == "study":
        from trainer.analysis.study.file import read
        from trainer.bench import study

        return study.bench(read(a.file), a.arms.split(",") if a.arms else None, a.rounds)
    if part == "inference" and (a.forms or a.against):
        return _forms(a)
    config = configuration(a)
    if part == "input" and a.order_only:
        from trainer.bench import order

        return order.bench(config.data, config.seed, a.examples, a.shards, a.world)
    if part == "input":
        from trainer.bench import input

        rows = a.rows.split(",") if a.rows else None
        return input.bench(config, images=a.images, workers=a.workers, batch=a.batch, passes=a.passes, only=rows)
    if part == "remote":
        from trainer.bench import remote

        options = {"latency": a.latency, "workers": a.workers, "batch": a.batch, "passes": a.passes, "limit": a.limit}
        return remote.bench(config, **options)
    if part == "gpu-counts":
        from trainer.bench.gpu import counts

        return counts.bench(config, a.rows.split(";") if a.rows else None)
    if part == "step":
        from trainer.bench import step
        from trainer.config.load import load

        return step.bench(config, load(a.against) if a.against else None, a.pairs)
    if part == "checkpoint":
        from trainer.bench import checkpoint

        return checkpoint.bench(config, a.saves, a.examples)
    from trainer.bench import engine

    if part == "inference":
        from trainer.bench import inference

        return inference.bench(config, a.density, engine.batches(a.batches, "1,32,256", "1,8", "--batches"), a.rounds)
    images = engine.batches(a.images_per_device)
    engine.on_every_device(a.processes)
    return engine.bench(config, images, a.rounds, a.rows.split(",") if a.rows else None)


def _forms(a: argparse.Namespace) -> BenchResult:
    """`bench inference --forms`, of a configuration or the directory of a run."""
    from trainer.bench import engine, pruned

    if not a.forms:
        raise ConfigError(f"--against {a.against}: compares forms of pruned weights; add --forms, e.g. --forms compact,block")
    batches = engine.batches(a.batches, "1,32,256", "1,8", "--batches")
    run = Path(a.config)
    source = run if run.is_dir() else configuration(a)
    return pruned.bench(source, a.forms.split(","), batches, a.rounds, a.against, a.overrides)
