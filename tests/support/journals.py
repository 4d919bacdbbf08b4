"""A journal as a run writes it, made up: what the tests of console, report, tracking and compare read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG = {
    "name": "tri",
    "runs": "runs",
    "seed": 0,
    "epochs": 4,
    "optim": {"lr": 1e-3, "name": "adamw"},
    "tracking": {"tags": {"who": "test"}},
}
START = {
    "config": CONFIG, "world": 2, "hosts": ["one"], "device": "cpu", "launcher": "accelerate",
    "commit": "c0ffee", "dirty": False, "python": "3.11.7", "versions": {"torch": "2.15.0"},
    "pixels": [], "parameters": 1000, "multiply_adds": 100.0,
    "data": {split: {"pattern": f"{split}-{{0..3}}.tar", "fingerprint": f"{split}-abc", "images": 400, "classes": 10}
             for split in ("train", "validation")},
}  # fmt: skip


def lines(
    epochs: int = 4, steps: int = 10, every: int = 2, rate: float = 100.0, seed: int = 0, sparse: bool = True
) -> Iterator[dict]:
    """4 epochs of 10 steps of 40 images at `rate` images/s; in the second half sparse runs keep half of all three."""
    clock, step, logged = 1_700_000_000.0, 0, 0

    def at(kind: str, **fields: Any) -> dict:
        return {"kind": kind, "time": clock, "attempt": 0} | fields

    yield at("start", **START | {"config": CONFIG | {"seed": seed, "epochs": epochs}})
    for epoch in range(epochs):
        keep = 0.5 if sparse and epoch >= epochs // 2 else 1.0
        batches = round(steps * keep)
        where = {"epoch": epoch, "step": step, "progress": float(epoch)}
        yield at(
            "epoch", **where, kept=round(400 * keep), examples=400, steps=batches, leftover=0, facts={"swapped": 3 * epoch}
        )
        if epoch in (0, epochs // 2):
            cost = {"tokens": [16, 16, round(16 * keep), round(16 * keep)], "multiply_adds": 100.0 * keep}
            yield at("plateau", **where, keep_tokens=keep, keep_connections=keep, **cost)
        for batch in range(batches):
            step += 1
            clock += 40 / rate
            if step % every == 0 or batch + 1 == batches:
                progress = epoch + (batch + 1) / batches
                seen, logged = step - logged, step
                yield at(
                    "step", epoch=epoch, batch=batch, step=step, progress=progress, loss=2.3 / (1 + progress), lr=1e-3,
                    grad_norm=1.0, images=40 * seen, seconds=40 * seen / rate, images_per_second=rate, data_wait=0.1,
                    keep_tokens=keep, keep_connections=keep,
                )  # fmt: skip
        clock += 0.5
        top1 = 0.9 * (1 - 0.5 ** (epoch + 1)) + 0.001 * seed
        where = {"epoch": epoch, "step": step, "progress": epoch + 1.0}
        for ema in (False, True):
            yield at(
                "eval", **where, top1=top1 + 0.01 * ema, top5=0.99, worst_class=0.2, loss=0.3, images=400, ema=ema, seconds=0.5
            )
        yield at("checkpoint", **where, batch=0, path=f"step-{step}", bytes=1000, seconds=0.1)
    yield at("end", status="finished", reason="", step=step, seconds=9.0, images=1200, device_hours=0.005)


def write(directory: Path, of: Iterator[dict] | list[dict]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "journal.jsonl").open("a") as file:
        for line in of:
            file.write(json.dumps(line) + "\n")
    return directory
