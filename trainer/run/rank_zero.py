"""What rank 0 writes of an attempt: lines of the journal, the person's console, kept lists, MLflow's shipper, the report at the end."""

from __future__ import annotations

from itertools import chain as joined
from pathlib import Path
from typing import Any

from sparsity.types import Plan, Selection
from sparsity.vit import SparseViT
from trainer.analysis import report
from trainer.analysis.savings import savings, savings_of
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.order import EpochOrder
from trainer.data.shards.index import Index
from trainer.engine.engine import Engine
from trainer.journal.reader import lineage
from trainer.journal.writer import Journal
from trainer.model.evaluate import Scores
from trainer.provenance import kept_lists
from trainer.run import description, nonfinite_steps
from trainer.run.console import Console
from trainer.run.dense_baseline import describe
from trainer.storage.standard_streams import say
from trainer.telemetry.efficiency import Efficiency
from trainer.telemetry.meters import MeterReading
from trainer.tracking.shipper import Shipper, start

LISTED = 64  # leftover ids written out in a line; beyond, their number
SENDING = 60  # s that MLflow gets for the rest at the end of a run


class RankZeroLog:
    """From the first line of an attempt to its last one; what it is told has been agreed by all ranks."""

    def __init__(self, config: Config, journal: Journal, efficiency: Efficiency, state: TrainState):
        """state: where the attempt begins."""
        self.config, self.journal, self.efficiency = config, journal, efficiency
        self.directory = config.directory()
        self.console = Console(config.name, config.epochs, start=float(state.epoch))
        self.shipper: Shipper | None = None

    def say(self, text: str) -> None:
        """A message, to the journal and to the person."""
        self.journal.write("message", text=text)
        self.console.message(text)

    def start(self, state: TrainState, engine: Engine, data: dict[str, Index], model: SparseViT, facts: dict[str, Any]) -> None:
        """The first lines; what the run is goes into files beside them. From here on lines are shipped."""
        self.journal.write("start", **description.start_line(self.config, engine, data, model), **facts)
        if self.journal.attempt:
            self.journal.write("resume", epoch=state.epoch, batch=state.batch, step=state.step)
        if state.step:
            self.console.message(f"{self.config.name}: goes on at epoch {state.epoch}, batch {state.batch} (step {state.step})")
        try:
            description.write(self.directory, self.config, model)
        except OSError as error:
            self.say(f"{self.directory}: environment.txt and plan.md could not be written: {error}")
        if self.config.tracking.to == "mlflow":
            self.shipper = start(self.directory, self.config.tracking)

    def epoch(self, state: TrainState, selection: Selection, order: EpochOrder, examples: int) -> None:
        """What the epoch shows, and its list to disk, for replay and audit; where there is no room the run goes on without."""
        self.efficiency.kept = selection.num_kept / max(examples, 1)
        leftover = order.leftover()
        try:
            kept_lists.write(self.directory, selection)
        except OSError as error:
            name = selection.facts["hash"]
            self.say(f"the kept list {name} could not be written ({error}): its epochs can't be replayed or audited")
        self.journal.write(
            "epoch",
            epoch=state.epoch,
            batch=state.batch,
            step=state.step,
            kept=selection.num_kept,
            examples=examples,
            steps=order.steps,
            leftover={"count": len(leftover), "ids": leftover[:LISTED].tolist()},
            facts=selection.facts,
        )
        self.console.epoch(kept=selection.num_kept, examples=examples)

    def plan(self, state: TrainState, progress: float, plan: Plan, cost: dict[str, Any]) -> None:
        """A new plateau."""
        self.efficiency.cost = cost
        where = {"epoch": state.epoch, "step": state.step, "progress": progress}
        self.journal.write("plateau", **where, keep_tokens=plan.keep_tokens, keep_connections=plan.keep_connections, **cost)

    def control(self, state: TrainState, progress: float, facts: dict[str, Any]) -> None:
        """The dense control of a plateau, and what the run saved so far."""
        line = {"epoch": state.epoch, "step": state.step, "progress": progress, **facts}
        if "measured" in facts:
            so_far = savings(joined(lineage(self.directory), [{"kind": "control", **line}]))
            line["bound"] = facts["bound_passes"] * so_far.kept
            line |= {"run_speedup": so_far.speedup, "run_bound": so_far.bound, "timed": so_far.timed}
        self.journal.write("control", **line)
        self.console.message(describe(line))

    def step(self, state: TrainState, reading: MeterReading, **facts: Any) -> None:
        """A log line, the broken images before it, what ranks and nodes say behind it."""
        where = {"epoch": state.epoch, "batch": state.batch, "step": state.step}
        for number, reason in reading.broken.items():
            self.journal.write("broken", **where, id=number, reason=reason)
            self.console.message(f"broken image {number}: {reason}; it counts for nothing in the loss, the run goes on")
        line = where | facts | reading.facts | self.efficiency.of(reading, state.seconds)
        line |= {"chain": state.chain, "seconds_total": state.seconds, "images_total": state.images}
        self.journal.write("step", **line)
        self.console.step(**line)
        if reading.ranks:
            self.journal.write("ranks", step=state.step, **reading.ranks)
        if reading.nodes:
            self.journal.write("system", step=state.step, **reading.nodes)

    def skipped(self, line: dict[str, Any]) -> None:
        """A step that was not taken, see `nonfinite_steps.journal_line`."""
        self.journal.write("skipped", **line)
        self.console.message(nonfinite_steps.describe(line, self.directory))

    def scored(self, state: TrainState, results: list[tuple[bool, Scores]], progress: float, plan: Plan) -> None:
        """A line for the weights, and one for their average where there is one."""
        for ema, scores in results:
            facts = {"epoch": state.epoch, "step": state.step, "progress": progress, "ema": ema, **scores._asdict()}
            facts["per_class"] = [round(accuracy, 4) for accuracy in scores.per_class]
            self.journal.write("eval", **facts, keep_tokens=plan.keep_tokens, keep_connections=plan.keep_connections)
            self.console.eval(top1=scores.top1, ema=ema)

    def saved(self, state: TrainState, path: Path, blocking: float, seconds: float) -> None:
        """A checkpoint, see `Recorder.saved`."""
        size = sum(file.stat().st_size for file in path.iterdir())
        where = {"epoch": state.epoch, "batch": state.batch, "step": state.step, "path": str(path.relative_to(self.directory))}
        self.journal.write("checkpoint", **where, bytes=size, blocking=blocking, seconds=seconds)

    def end(self, state: TrainState, status: str, reason: str) -> None:
        """The last line, the report, and up to SENDING seconds for what MLflow has not yet."""
        saved = savings_of(self.directory)
        facts = self.efficiency.so_far(state.seconds)
        facts |= {"run_speedup": saved.speedup, "run_bound": saved.bound, "timed": saved.timed}
        about = {"step": state.step, "seconds": state.seconds, "images": state.images}
        self.journal.write("end", status=status, reason=reason, **about, **facts)
        try:
            report.write(self.directory)
        except Exception as error:  # table and picture can be made again; a run must not fail over them
            say(f"no report: {error}; try `trilevel report {self.directory}`")
        self.console.end(status, state.step)
        self.console.close()
        if self.shipper is not None and (said := self.shipper.finish(timeout=SENDING).message):
            say(said)
