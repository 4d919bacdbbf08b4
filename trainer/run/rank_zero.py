"""What rank 0 writes in an attempt: journal lines, console output, kept lists, the report; it also starts the MLflow shipper."""

from __future__ import annotations

import math
from itertools import chain as joined
from pathlib import Path
from typing import Any

import torch

from sparsity.network import SparseNetwork
from sparsity.plan_mix import PlanMix
from sparsity.types import Selection
from trainer.analysis.history import history, stored_bytes
from trainer.analysis.report import summary as report
from trainer.analysis.report.goodput import time_account
from trainer.analysis.report.savings import savings, savings_of
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.order import EpochOrder
from trainer.data.shards.index import Index
from trainer.engine.engine import Engine
from trainer.journal.reader import lineage, read
from trainer.journal.writer import Journal
from trainer.model.evaluate import Evaluated
from trainer.provenance import kept_lists
from trainer.run import description, nonfinite_steps
from trainer.run.console import Console
from trainer.run.dense_baseline import describe
from trainer.run.directory import how_to_continue
from trainer.storage.disk import Content
from trainer.storage.standard_streams import say
from trainer.telemetry.efficiency import Efficiency
from trainer.telemetry.meters import MeterReading
from trainer.tracking.shipper import Shipper, start

LISTED = 64  # leftover ids listed in a journal line, which always has their count
SENDING = 60  # s to wait for MLflow to receive the rest at the end of a run


class RankZeroLog:
    """The journal and console of one attempt. All ranks agree on the arguments of its methods."""

    def __init__(self, config: Config, journal: Journal, efficiency: Efficiency, state: TrainState):
        """state: at the start of the attempt."""
        self.config, self.journal, self.efficiency = config, journal, efficiency
        self.directory = config.directory()
        self.console = Console(config.name, config.epochs, start=float(state.epoch))
        self.shipper: Shipper | None = None
        self.world = 1  # processes, from `start` on

    def say(self, text: str) -> None:
        """A message to the journal and to the console."""
        self.journal.write("message", text=text)
        self.console.message(text)

    def start(
        self, state: TrainState, engine: Engine, data: dict[str, Index], model: SparseNetwork, facts: dict[str, Any]
    ) -> None:
        """The first lines of the attempt, environment.txt and plan.md. Starts the MLflow shipper."""
        self.world = engine.world
        self.journal.write("start", **description.start_line(self.config, engine, data, model), **facts)
        for text in facts.get("warnings", ()):
            self.console.message(f"warning: {text}")
        if self.journal.attempt:
            self.journal.write("resume", epoch=state.epoch, batch=state.batch, step=state.step)
        if state.step:
            self.console.message(f"{self.config.name}: resumes at epoch {state.epoch}, batch {state.batch} (step {state.step})")
        try:
            description.write(self.directory, self.config, model)
        except OSError as error:
            self.say(f"{self.directory}: environment.txt and plan.md could not be written: {error}")
        if self.config.tracking.to == "mlflow":
            self.shipper = start(self.directory, self.config.tracking)

    def epoch(self, state: TrainState, selection: Selection, order: EpochOrder, examples: int) -> None:
        """The epoch's line and its kept list, which replay and audit need. If the list can't be written, the run continues without."""
        self.efficiency.kept = selection.num_kept / max(examples, 1)
        leftover = order.leftover()
        try:
            kept_lists.write(self.directory, selection)
        except OSError as error:
            name = selection.facts["hash"]
            self.say(
                f"kept list {name} could not be written ({error}): its epochs can't be replayed or audited; free disk space"
            )
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

    def plan(self, state: TrainState, progress: float, plans: PlanMix, cost: dict[str, Any]) -> None:
        """A new plateau."""
        self.efficiency.cost = cost
        where = {"epoch": state.epoch, "step": state.step, "progress": progress}
        facts = {"keep_tokens": plans.keep_tokens, "keep_connections": plans.keep_connections, **cost}
        if len(plans.parts) > 1:
            facts["draws"] = [[share, plan.keep_tokens, plan.keep_connections] for share, plan in plans.parts]
        self.journal.write("plateau", **where, **facts)

    def control(self, state: TrainState, progress: float, facts: dict[str, Any]) -> None:
        """The dense baseline of a plateau, and the savings of the run so far."""
        line = {"epoch": state.epoch, "step": state.step, "progress": progress, **facts}
        if "measured" in facts:
            so_far = savings(joined(lineage(self.directory), [{"kind": "control", **line}]))
            line["bound"] = facts["bound_passes"] * so_far.kept
            line |= {"run_speedup": so_far.speedup, "run_bound": so_far.bound, "timed": so_far.timed}
        self.journal.write("control", **line)
        self.console.message(describe(line))

    def step(self, state: TrainState, reading: MeterReading, spent: dict[str, float], **facts: Any) -> None:
        """A log line, preceded by the broken images of its interval, followed by the readings of ranks and nodes. spent: as in `end`."""
        where = {"epoch": state.epoch, "batch": state.batch, "step": state.step}
        for number, reason in reading.broken.items():
            self.journal.write("broken", **where, id=number, reason=reason)
            self.console.message(f"broken image {number}: {reason}; excluded from the loss, training continues")
        line = where | facts | reading.facts | self.efficiency.of(reading, spent)
        line |= {"spent": spent, "chain": state.chain, "seconds_total": state.seconds, "images_total": state.images}
        self.journal.write("step", **line)
        self.console.step(**line)
        if reading.ranks:
            self.journal.write("ranks", step=state.step, **reading.ranks)
        if reading.nodes:
            self.journal.write("system", step=state.step, **reading.nodes)

    def skipped(self, line: dict[str, Any]) -> None:
        """A skipped step, see `nonfinite_steps.journal_line`."""
        self.journal.write("skipped", **line)
        self.console.message(nonfinite_steps.describe(line, self.directory))

    def probed(self, state: TrainState, facts: dict[str, Any]) -> None:
        """A probe of the epoch that ended at `state`."""
        self.journal.write("probe", step=state.step, progress=state.progress, **facts)

    def pruned(self, state: TrainState, facts: dict[str, Any]) -> None:
        """The weights at the start of an epoch; on the console when groups leave."""
        self.journal.write("weights", epoch=state.epoch, step=state.step, progress=state.progress, **facts)
        if facts["event"] == "pruned":
            sizes = facts["bytes"]
            self.console.message(
                f"epoch {state.epoch}: pruned to {facts['kept']:.1%} of the weights of {len(facts['layers'])} layers; {sizes['block']:,} "
                f"bytes of {sizes['dense']:,} (CSR {sizes['csr']:,}); {facts['multiply_adds']:.4g} multiply-adds per image"
            )

    def scored(self, state: TrainState, results: list[Evaluated], progress: float) -> None:
        """Under the run's own plan a line for the weights, and one for their EMA if there is one; a line of kind `density` for each of
        `evaluate.densities`."""
        for ema, plan, scores, beside in results:
            facts = {"epoch": state.epoch, "step": state.step, "progress": progress, "ema": ema, **scores._asdict()}
            del facts["reasons"]  # of this rank alone; `Recorder.scored` reports those of all ranks
            facts["per_class"] = [round(accuracy, 4) for accuracy in scores.per_class]
            facts |= {"keep_tokens": plan.keep_tokens, "keep_connections": plan.keep_connections}
            self.journal.write("density" if beside else "eval", **facts)
            if not beside:
                self.console.eval(top1=scores.top1, ema=ema)
        found = [f"{r.plan.keep_tokens:g}: {r.scores.top1:.2%}" for r in results if r.beside and r.ema == results[-1].ema]
        if found:
            self.console.message(f"epoch {progress:g}, top-1 by density: {', '.join(found)}")

    def saved(self, state: TrainState, path: Path, blocking: float, seconds: float, weights: Content | None) -> None:
        """A checkpoint, see `Recorder.saved`."""
        size = sum(file.stat().st_size for file in path.iterdir())
        where = {"epoch": state.epoch, "batch": state.batch, "step": state.step, "path": str(path.relative_to(self.directory))}
        about = {} if weights is None else {"weights": {"bytes": weights.size, "hash": weights.hash}}
        self.journal.write("checkpoint", **where, bytes=size, blocking=blocking, seconds=seconds, **about)

    def end(self, state: TrainState, status: str, reason: str, spent: dict[str, float], rate: float | None = None) -> None:
        """The last line and the report; waits up to SENDING seconds for MLflow to receive the rest. spent: seconds of this attempt by
        cause, see `engine.place_clock`. rate: FLOP/s of this device in matrix products now, where it was measured."""
        saved = savings_of(self.directory)
        facts = self.efficiency.so_far(spent)
        facts |= {"run_speedup": saved.speedup, "run_bound": saved.bound, "timed": saved.timed}
        about = {"step": state.step, "progress": state.progress, "seconds": state.seconds, "images": state.images}
        if not math.isnan(
            stored := stored_bytes(history(self.directory))
        ):  # runs of old versions lack the number of parameters
            about["weights_bytes"] = stored
        line = {"status": status, "reason": reason, **about, **facts, "spent": spent}
        if self.config.engine.compile:
            line["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if rate is not None:
            line["matrix_tflops"] = rate / 1e12
        now = {"kind": "end", "attempt": self.journal.attempt, "time": self.journal.now(), **line}
        account = time_account(joined(read(self.directory), [now]))
        line |= {"goodput": account.goodput, "paused": account.paused}
        self.journal.write("end", **line, by_cause=account.seconds)
        try:
            report.write(self.directory)
        except Exception as error:  # the report can be made again; it must not fail a run
            say(f"report not written: {error}; make it with `trilevel report {self.directory}`")
        self.console.end(status, state.step, state.progress)
        if status == "stopped":
            at = self.config.stop_at if reason.startswith("stop_at") else None
            self.console.message(f"  {how_to_continue(self.directory, self.world, at)}")
        self.console.close()
        if self.shipper is not None and (message := self.shipper.finish(timeout=SENDING).message):
            say(message)
