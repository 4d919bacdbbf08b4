"""`trilevel bench input --order-only`: time and memory for computing the order of examples on a rank, for any data set and world size.

Needs no shards: set-up of an epoch with a fifth of the examples removed, its first batches, and the first batches of a resume in
mid-epoch. Memory: peak of all allocations, with the packed list of kept examples.
"""

from __future__ import annotations

import time
import tracemalloc

import numpy as np

from trainer.bench.result import BenchResult, stats
from trainer.config.errors import ConfigError
from trainer.config.schema import DataConfig
from trainer.data.loader.shuffle_quality import shuffle_quality
from trainer.data.order import EpochOrder, Layout, slice_of

BATCHES, KEPT, PER_RANK = 10, 0.8, 32
QUALITY, CLASSES = 5_000_000, 1000


def bench(data: DataConfig, seed: int, examples: int, shards: int, world: int) -> BenchResult:
    """Measure one rank (the middle one) of `world`. The batch of `data` is raised to at least 32 per rank.

    Rows: set_up: layout and epoch; start, resume: set-up and the next 10 batches from the epoch's start, from its middle; memory:
    peak of allocations. One measurement each: a second one would find warm memory.
    """
    if not 0 < shards <= examples:
        raise ConfigError(f"--examples {examples} --shards {shards}: must be 1 <= shards <= examples")
    group = data.lanes * data.repeats * 2
    batch = max(data.batch, -(-PER_RANK * world // group) * group)
    keep = _keep(examples)
    bounds = slice_of(batch, world, world // 2)

    def ordered() -> EpochOrder:
        sizes = np.full(shards, examples // shards, dtype=np.int64)
        sizes[: examples % shards] += 1
        return EpochOrder(Layout(sizes, seed, batch, data.lanes, data.window, data.homes, data.repeats), 3, keep)

    def batches(share: float) -> tuple[float, float]:
        """Seconds for the order, and for it and BATCHES batches from this share of the epoch on."""
        started = time.perf_counter()
        order = ordered()
        ready = time.perf_counter()
        first = int(order.steps * share)
        for step in range(first, min(order.steps, first + BATCHES)):
            order.rows(step, *bounds)
        return ready - started, time.perf_counter() - started

    set_up, start = batches(0.0)
    resume = batches(0.5)[1]
    tracemalloc.start()  # numpy reports its allocations to it; measured separately because it slows down
    batches(0.5)
    memory = tracemalloc.get_traced_memory()[1] + keep.nbytes
    tracemalloc.stop()
    title = (
        f"order of {examples:,} examples in {shards:,} shards, one rank of {world:,}; batch {batch}, {data.lanes} lanes, "
        f"window {data.window}"
    )
    times = {"set_up": set_up, "start": start, "resume": resume}
    rows = {name: stats([seconds], "s") for name, seconds in times.items()} | {"memory": stats([memory / 2**20], "MiB")}
    return BenchResult(title, rows, {"measured": "{median:.3g}", "unit": "{unit}"}, _quality(ordered(), examples))


def _quality(order: EpochOrder, examples: int) -> list[str]:
    if examples > QUALITY:
        return [f"shuffle quality: not measured above {QUALITY:,} examples"]
    in_order = np.arange(examples) * min(CLASSES, examples) // examples
    layouts = {
        "classes mixed over the shards": np.random.default_rng(0).permutation(in_order),
        "class-sorted shards": in_order,
    }
    found = {name: shuffle_quality(order, labels, 16) for name, labels in layouts.items()}
    return [
        f"shuffle quality, {name}: classes {q.classes:.2f}, shards {q.shards:.2f}, same-class mixup pairs {q.pairs:.2f} "
        "(1 is a full shuffle)"
        for name, q in found.items()
    ]


def _keep(examples: int) -> np.ndarray:
    """Packed bits with KEPT of them set, drawn a block at a time: the list itself is 12.5 MB at 10^8 examples."""
    rng = np.random.default_rng(0)
    bits = np.packbits(rng.random(1 << 20) < KEPT, bitorder="little")
    keep = np.resize(bits, -(-examples // 8))
    if examples % 8:
        keep[-1] &= (1 << examples % 8) - 1
    return keep
