"""`trilevel bench PART`: what each part measures is in a module of its own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from trainer.cli.output import configuration, show_table, write_json
from trainer.config.errors import ConfigError


def _input(a: argparse.Namespace) -> None:
    if a.plan_only:
        from trainer.bench.order import plan

        planned = plan(configuration(a), a.examples, a.shards, a.world)
        show_table(planned.table())
        print(planned.text())
        write_json(a.json, planned.rows())
        return
    from trainer.bench.input import bench

    rows = a.rows.split(",") if a.rows else None
    measured = bench(configuration(a), images=a.images, workers=a.workers, batch=a.batch, passes=a.passes, only=rows)
    show_table(measured.table())
    print(measured.text())
    write_json(a.json, measured.rows)


def _remote(a: argparse.Namespace) -> None:
    from trainer.bench.remote import bench

    measured = bench(configuration(a), latency=a.latency, workers=a.workers, batch=a.batch, passes=a.passes, limit=a.limit)
    show_table(measured.table())
    print(measured.text())
    write_json(a.json, measured.rows)


def _step(a: argparse.Namespace) -> None:
    from trainer.bench.step import bench
    from trainer.config.load import load

    measured = bench(configuration(a), load(a.against) if a.against else None, a.pairs)
    show_table(measured.table())
    print(measured.text())
    write_json(a.json, measured.rows)


def _checkpoint(a: argparse.Namespace) -> None:
    from trainer.bench.checkpoint import bench

    if (measured := bench(configuration(a), a.saves, a.examples)) is not None:
        show_table(measured.table())
        print(measured.text())
        write_json(a.json, measured.rows)


def _journal(a: argparse.Namespace) -> None:
    from trainer.bench.journal import bench, table

    rows = bench(a.lines, a.pause)
    show_table(table(rows))
    write_json(a.json, rows)


def _engine(a: argparse.Namespace) -> None:
    import torch

    from trainer.bench.engine import bench, on_every_device

    words = a.images_per_device or ("256,32" if torch.cuda.is_available() else "8,2")
    if not all(word.isdigit() and int(word) for word in words.split(",")):
        raise ConfigError(f"--images-per-device {words}: write numbers with commas between: 256,32")
    config = configuration(a)
    on_every_device(a.processes)
    measured = bench(config, [int(word) for word in words.split(",")], a.rounds, a.rows.split(",") if a.rows else None)
    if os.environ.get("RANK", "0") == "0":
        show_table(measured.table())
        print(measured.text())
        write_json(a.json, measured.rows)


BENCHES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "bench input": _input,
    "bench step": _step,
    "bench checkpoint": _checkpoint,
    "bench engine": _engine,
    "bench journal": _journal,
    "bench remote": _remote,
}
