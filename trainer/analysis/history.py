"""A run, read from its journal: counters along its lineage, for tables, plots and comparisons.

Times leave out the start of the processes, gaps between attempts, and steps of a killed attempt after the point from which the next one
resumed. Device time leaves out the gaps alone: what was paid for, x the number of processes (one per device).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from trainer.config.recorded import without_foreign
from trainer.journal.attempts import attempts_of
from trainer.journal.reader import FILE, lineage, read


@dataclass(frozen=True)
class Point:
    """Counters at a line of the journal. Multiply-adds: forward, over all images so far, probed ones included; nan if the journal lacks
    them."""

    step: int
    progress: float
    elapsed: float  # seconds, with evaluation and checkpoints, without gaps between attempts
    trained: float  # seconds of training steps, and of the probes of `examples.rule: probe`
    images: int  # presented to the model in training
    multiply_adds: float
    dense_multiply_adds: float  # of a dense model on every example; a run that keeps half of both takes a quarter
    device_seconds: float  # of all attempts, with the start of their processes and work that was lost
    line: dict[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.line[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.line.get(name, default)


@dataclass(frozen=True)
class History:
    """One run. `starts`: the start line of every attempt; `points`: lines of each kind, oldest first; `last`: the newest one."""

    directory: Path
    starts: list[dict[str, Any]]
    status: str  # of the last attempt: "finished", "stopped", "failed", or "running" (also if it was killed)
    reason: str
    points: dict[str, list[Point]]
    last: Point

    @property
    def start(self) -> dict[str, Any]:
        """Of the first attempt."""
        return self.starts[0] if self.starts else {}

    @property
    def attempts(self) -> int:
        return len(self.starts)

    @property
    def finished(self) -> bool:
        """Whether its costs and its last score are those of the whole run."""
        return self.status == "finished"

    @property
    def matrix_tflops(self) -> float | None:
        """The highest rate that a device reached in matrix products, at the start of an attempt or at the end of one: other processes on
        the machine lower a measurement, nothing raises it."""
        found = [line.get("matrix_tflops") for line in [*self.starts, *(point.line for point in self.of("end"))]]
        return max((rate for rate in found if rate), default=None)

    def mfu(self, rate: float | None = None) -> float | None:
        """Median MFU of the log lines relative to `rate` (TFLOP/s of a device, default: `matrix_tflops`); each line was written relative to
        the rate at the start of its attempt. None where the journal lacks it."""
        at_start = {line.get("attempt", 0): line.get("matrix_tflops") for line in self.starts}
        best = rate or self.matrix_tflops
        found = [
            point["mfu"] * ((at_start.get(point.get("attempt", 0)) or best) / best if best else 1.0)
            for point in self.of("step")
            if point.get("mfu") is not None
        ]
        return median(found) if found else None

    @property
    def config(self) -> dict[str, Any]:
        return without_foreign(self.start.get("config") or {})

    @property
    def name(self) -> str:
        return self.config.get("name") or self.directory.name

    def of(self, kind: str) -> list[Point]:
        return self.points.get(kind, [])

    def evals(self, ema: bool = False) -> list[Point]:
        return [point for point in self.of("eval") if bool(point.get("ema")) == ema and point.get("top1") is not None]

    def at_density(self, density: float) -> History:
        """The same run with the scores at one of its `evaluate.densities` as its evaluations; without evaluations where it has none."""
        points = [point for point in self.of("density") if point.get("keep_tokens") == density]
        return replace(self, points={**self.points, "eval": points})

    @property
    def images_per_second(self) -> float:
        """Mean over all training steps, without evaluation and checkpoints; 0 before the first step line."""
        return self.last.images / self.last.trained if self.last.trained > 0 else 0.0

    @property
    def saved(self) -> float | None:
        """Share of multiply-adds saved, relative to a dense model on every example of these epochs; None if unknown."""
        dense = self.last.dense_multiply_adds
        return 1 - self.last.multiply_adds / dense if dense > 0 else None

    def shares(self, kept: str) -> list[tuple[Point, float]]:
        """The kept share of "examples", "tokens" or "connections" from each point on; empty if the journal lacks it.

        "examples": kept / all. "tokens": tokens computed in all blocks / those of the dense network, if the lines list them, else the
        keep ratio.
        """
        if kept == "examples":
            return [(point, point["kept"] / point["examples"]) for point in self.of("epoch") if point.get("examples")]
        pairs = ((point, _share(point, kept, self.start.get("tokens"))) for point in self.of("plateau") or self.of("step"))
        return [(point, share) for point, share in pairs if share is not None]

    def mean_share(self, kept: str) -> float | None:
        """`shares` averaged over epochs (examples) or over the images presented (tokens, connections)."""
        shares = self.shares(kept)
        if not shares:
            return None
        if kept == "examples":
            return sum(share for _, share in shares) / len(shares)
        ends = [point.images for point, _ in shares[1:]] + [self.last.images]
        weights = [end - point.images for (point, _), end in zip(shares, ends, strict=True)]
        total = sum(weights)
        return sum(w * share for w, (_, share) in zip(weights, shares, strict=True)) / total if total else shares[-1][1]


def history(directory: Path | str) -> History:
    """Read a run directory, or the journal in it. Raises JournalError if it has no journal."""
    directory = Path(directory)
    directory = directory.parent if directory.name == FILE else directory
    points: dict[str, list[Point]] = {}
    starts: list[dict[str, Any]] = []
    status, reason = "running", ""
    step, progress, trained, images = 0, 0.0, 0.0, 0
    cost, dense_cost, per_image, dense, kept = 0.0, 0.0, float("nan"), float("nan"), 1.0
    logged = 0  # step of the last step line
    plans: list[tuple[int, float, float]] = []  # since then: (step up to which they held, per_image, kept)
    elapsed, device_seconds, clock, started = 0.0, 0.0, 0.0, -1  # started: the last attempt with a start line
    attempts = dict(sorted(attempts_of(read(directory)).items()))
    paid = [one.device_seconds for one in attempts.values()]
    earlier = dict(zip(attempts, accumulate(paid, initial=0.0), strict=False))  # device seconds of the attempts before each
    point = Point(0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, {})
    for line in lineage(directory):
        kind = line["kind"]
        if kind == "start":
            starts.append(line)
            status, reason = "running", ""
            clock, started = line["time"], line.get("attempt", 0)
            dense = line.get("multiply_adds", dense)
            continue
        if kind == "end":
            status, reason = str(line.get("status", "finished")), str(line.get("reason") or "")
        number = line.get("attempt", 0)
        if number == started:  # an attempt that failed before its start line trained no second
            elapsed += max(0.0, line["time"] - clock)
            clock = max(clock, line["time"])
        if number in attempts:
            device_seconds = max(device_seconds, earlier[number] + attempts[number]._replace(last=line["time"]).device_seconds)
        if isinstance(line.get("step"), int):
            step = max(step, line["step"])  # a checkpoint line is written once it is on disk, after lines of later steps
        progress = line.get("progress", progress)
        if kind == "step":
            trained += line.get("seconds", 0.0)
            images += int(line.get("images", 0))
            for share, own, shown in _stretches(plans, logged, step, (per_image, kept)):
                cost += share * line.get("images", 0) * own
                dense_cost += share * line.get("images", 0) * dense / shown
            logged, plans = step, []
        elif kind == "probe":
            trained += line.get("seconds", 0.0)
            cost += line.get("probed", 0) * line.get("multiply_adds", float("nan"))
        elif kind in ("epoch", "plateau"):
            plans.append((step, per_image, kept))
            per_image = line.get("multiply_adds", per_image)
            kept = line["kept"] / line["examples"] if line.get("kept") and line.get("examples") else kept
        point = Point(step, progress, elapsed, trained, images, cost, dense_cost, device_seconds, line)
        points.setdefault(kind, []).append(point)
    return History(directory, starts, status, reason, points, point)


def _stretches(
    plans: list[tuple[int, float, float]], begin: int, end: int, last: tuple[float, float]
) -> Iterator[tuple[float, float, float]]:
    """The steps from `begin` + 1 to `end`, split by plan and epoch: (share of them, per_image, kept).

    plans: (step up to which they held, per_image, kept) of all but the last one.
    """
    done = begin
    for until, per_image, kept in [*plans, (end, *last)]:
        if until > done:
            yield (until - done) / (end - begin), per_image, kept
            done = until


def _share(point: Point, kept: str, dense: Any) -> float | None:
    """dense: tokens of each block with everything kept, which differ between the stages of a hierarchical network; journals of earlier
    versions lack them, and have only networks where they do not."""
    tokens = point.get("tokens")
    if kept == "tokens" and isinstance(tokens, list) and tokens:
        known = isinstance(dense, list) and len(dense) == len(tokens)
        return sum(tokens) / (sum(dense) if known else len(tokens) * max(tokens))
    return point.get(f"keep_{kept}")


def left_of_weights(run: History, name: str) -> float:
    """A number of the run's last `weights` line; NaN in a run without level 4."""
    return float(run.of("weights")[-1][name]) if run.of("weights") else float("nan")


def stored_bytes(run: History) -> float:
    """Bytes of all weights of a run's network in float32: of pruned layers the groups that are left, with their indices. NaN where the
    journal lacks the number of parameters."""
    dense = 4.0 * run.start.get("parameters", float("nan"))
    sizes = run.of("weights")[-1]["bytes"] if run.of("weights") else {"dense": 0}
    return dense - sizes["dense"] + sizes.get("block", sizes["dense"])
