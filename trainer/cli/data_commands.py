"""Handlers of the commands around data sets: pack, init, index, verify."""

from __future__ import annotations

import argparse

from trainer.cli.output import show, write_json


def pack(a: argparse.Namespace) -> None:
    from trainer.data.shards.pack import pack

    pack(
        a.source, a.destination, labels=a.labels, layout=a.layout, name=a.name, hold_out=a.hold_out, seed=a.seed,
        shard_size=int(a.shard_size * 2**20), workers=a.workers, short_side=a.short_side, quality=a.quality, show=show,
    )  # fmt: skip


def init(a: argparse.Namespace) -> None:
    from trainer.preflight.first_config import write_configs

    found, (path, dense) = write_configs(a.folder, a.out, a.epochs)
    show(found.text())
    show(f"{path}: with the levels; {dense}: the dense baseline. Next: trilevel train {path} --check")


def index(a: argparse.Namespace) -> None:
    from trainer.data.loader.shuffle_quality import runs_of_class
    from trainer.data.remote.cache import cache_at
    from trainer.data.shards.index import build_index
    from trainer.data.shards.one_based import counts_from_one, renumber

    cache = cache_at(a.cache, a.cache_size)
    index = build_index(a.shards, a.labels, workers=a.workers, folder=a.index, cache=cache)
    if index.is_files():
        show(f"{a.shards}: {len(index)} image files, {len(index.classes)} classes; index: {index.path}")
        return
    show(f"{a.shards}: {len(index)} images, {len(index.classes)} classes, {len(index.names)} shards; index: {index.path}")
    if counts_from_one(index):
        show(f"warning: {renumber(index)}")
    share, chance = runs_of_class(index)
    if share > 0.5 and share > 2 * chance:
        show(
            f"warning: shards are sorted by class: {share:.0%} of neighbours share a label ({chance:.1%} if shuffled); "
            "`trilevel train CONFIG --check` measures how well a run's order mixes them, `trilevel pack` shuffles"
        )


def verify(a: argparse.Namespace) -> int:
    from trainer.data.remote.cache import cache_at
    from trainer.data.remote.url import scheme
    from trainer.preflight.verify_shards import verify

    cache = cache_at(a.cache, a.cache_size) if scheme(a.shards) or a.cache else None
    broken = verify(a.shards, a.labels, workers=a.workers, folder=a.index, cache=cache)
    for example in broken:
        show(f"{example.id}\t{example.where}\t{example.reason}")
    show(f"{a.shards}: {len(broken)} broken image(s)")
    write_json(a.json, [example._asdict() for example in broken])
    return int(bool(broken))
