"""The record of an attempt, on all ranks: counts and agrees on what is recorded; `RankZeroLog` writes it on rank 0."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.network import SparseNetwork
from sparsity.plan_mix import PlanMix
from sparsity.types import Selection
from trainer.analysis.report.goodput import before_attempt
from trainer.checkpoint.directory import Newest
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.order import EpochOrder
from trainer.data.shards.index import Index
from trainer.engine.engine import Engine
from trainer.journal.writer import Journal
from trainer.model.evaluate import Evaluated
from trainer.model.weights import save_weights
from trainer.run import broken_images, nonfinite_steps
from trainer.run import directory as run
from trainer.run.failures import Failures
from trainer.run.rank_zero import SENDING, RankZeroLog
from trainer.storage.disk import Content, Disk
from trainer.storage.process_age import since_start
from trainer.storage.standard_streams import say
from trainer.telemetry.efficiency import Efficiency
from trainer.telemetry.hardware import matrix_rate
from trainer.telemetry.meters import MeterReading
from trainer.telemetry.profiler import Trace


class RunResult(NamedTuple):
    """How a run ended: "finished", "stopped" (at `stop_at`) or "preempted" (by a signal; --resume continues it), and its last top-1."""

    status: str
    top1: float
    directory: Path


class Recorder:
    """The record of one attempt. Methods that take a TrainState and return one add their counts to it."""

    def __init__(self, config: Config, engine: Engine, resume: bool):
        """Create or reopen the run directory. Raises ConfigError on all ranks if it exists and `resume` is off."""
        self.config, self.engine = config, engine
        self.directory = config.directory()
        self.checkpoints = self.directory / "checkpoints"
        self._journal: Journal | None = None  # of rank 0
        self._log: RankZeroLog | None = None  # of rank 0, from `start` on
        self._plans: PlanMix | None = None
        self._state = TrainState()
        self._top1, self._examples = float("nan"), 0
        failure: Exception | None = None
        if engine.is_main:
            try:
                self._journal = run.create_run_directory(self.directory, config.resolved(), resume)
            except Exception as error:
                failure = error
        failure = engine.broadcast_object(failure)  # on all ranks, so that none of them waits for rank 0
        if failure is not None:
            raise failure
        run.log_to(self.directory / "logs" / f"rank-{engine.rank}.txt")
        self.attempt = int(engine.broadcast_object(self._journal.attempt if self._journal else 0))
        self._resumed = resume
        self.trace = Trace(config.trace, self.directory, engine.rank, engine.on_gpu, self._say)
        self._ended = False  # its last line is written
        self._failures = Failures(engine, self.directory, self.attempt, self._failed, self._failed_late)

    def start(self, state: TrainState, data: dict[str, Index], model: SparseNetwork, cost: dict[str, Any]) -> None:
        """First lines of the attempt; collective."""
        self._state, self._examples = state, len(data["train"])
        hosts = sorted(set(self.engine.all_gather_objects([os.uname().nodename])))
        rate = torch.tensor(matrix_rate(self.engine.device, self.config.engine.precision), dtype=torch.float64)
        rate = float(self.engine.all_reduce_sum(rate.to(self.engine.device)))
        if self._journal is None:
            return
        living = since_start()
        before = before_attempt(self.directory, self.attempt, self._journal.now(), living, state.step)
        efficiency = Efficiency(self.directory, self.attempt, self.engine.world, living, rate, before)
        self._log = RankZeroLog(self.config, self._journal, efficiency, state)
        facts = {"hosts": hosts, "matrix_tflops": rate / self.engine.world / 1e12, "starting": living, **cost}
        self._log.start(state, self.engine, data, model, facts)

    def epoch(self, state: TrainState, selection: Selection, order: EpochOrder, examples: int) -> None:
        """The examples that the epoch shows."""
        if self._log:
            self._log.epoch(state, selection, order, examples)

    def plan(self, state: TrainState, progress: float, plans: PlanMix, cost_of: Callable[[PlanMix], dict[str, Any]]) -> None:
        """A line when the plans of the steps change; `cost_of` gives tokens per block and multiply-adds, as expectations."""
        if self._log and plans != self._plans:
            self._plans = plans
            self._log.plan(state, progress, plans, cost_of(plans))

    def control(self, state: TrainState, progress: float, facts: dict[str, Any]) -> None:
        """A line of the dense baseline, with the savings of the run so far."""
        if self._log:
            self._log.control(state, progress, facts)

    def step(
        self, state: TrainState, reading: MeterReading, chain: str, norm: float, *, progress: float, lr: float, plan: PlanMix
    ) -> TrainState:
        """A log line; adds the broken images of its interval to the state. Raises DataError past `data.broken_share`."""
        meters, broken = reading.facts, reading.broken
        facts = {"progress": progress, "lr": lr, "keep_tokens": plan.keep_tokens, "keep_connections": plan.keep_connections}
        state = self._state = replace(
            state,
            images=state.images + int(meters["images"]),
            seconds=state.seconds + meters["seconds"],
            chain=chain,
            broken=state.broken | {str(k): v for k, v in broken.items()},
        )
        if self._log:
            self._log.step(state, reading, self.engine.heartbeat.clock.spent(), grad_norm=norm, **facts)
        broken_images.refuse_training(state.broken, self._examples, self.config.data.broken_share)
        return state

    def skipped(self, before: TrainState, state: TrainState, digest: str) -> TrainState:
        """The step that followed `before` was skipped; its batch has this digest. Raises EngineError if too many steps were, see
        `nonfinite_steps`. `state`: now, which is that step or one soon after it."""
        state = self._state = replace(state, skipped=[*state.skipped, before.step + 1])
        if self._log:
            self._log.skipped(nonfinite_steps.journal_line(before.epoch, before.batch, digest, state.skipped))
        nonfinite_steps.refuse_too_many(state.skipped, self.config.optim, self.directory)
        return state

    def pruned(self, state: TrainState, facts: dict[str, Any]) -> None:
        """The kept weights at the start of an epoch, see `model.pruning_figures`."""
        if self._log:
            self._log.pruned(state, facts)

    def probed(self, state: TrainState, facts: dict[str, Any]) -> None:
        """A probe of clean images by the rule `probe`, see `ExampleProbe`."""
        if self._log:
            self._log.probed(state, facts)

    def scored(self, state: TrainState, results: list[Evaluated], progress: float, saving: bool) -> TrainState:
        """Lines of an evaluation; the score of the run is the last one under its own plan. `saving`: this state is saved, so it may
        become the best. Collective where images are broken; raises DataError past `data.broken_share`: a score of other images must not
        become the best.
        """
        if self._log:
            self._log.scored(state, results, progress)
        scores = [result.scores for result in results if not result.beside][-1]
        if scores.broken:  # summed over ranks
            text = broken_images.of_validation(scores, self.engine, self.config.data.broken_share)
            if self._log:
                self._log.say(text)
        self._top1 = scores.top1
        better = saving and self._top1 > state.best
        return replace(state, best=self._top1, best_step=state.step) if better else state

    def weights(self, weights: dict[str, Tensor]) -> Content:
        """Write RUN/weights.safetensors, with timm's parameter names; its size and hash."""
        path = self.directory / "weights.safetensors"
        model = self.config.model  # a number of heads shows in no shape
        save_weights(path, weights, {"model": model.name, "args": json.dumps(model.args)})
        return Disk().content(path)

    def sync(self) -> None:
        """Sync the journal to disk."""
        if self._journal:
            self._journal.sync()

    def saved(self, state: TrainState, path: Path, blocking: float, seconds: float, weights: Content | None) -> None:
        """A checkpoint is on disk; it blocked training for `blocking` seconds, writing took `seconds`. weights: of the run's file."""
        if self._log:
            self._log.saved(state, path, blocking, seconds, weights)

    def report_found(self, found: Newest) -> None:
        """Report what the resume did not find, and the damaged checkpoints that it did not use."""
        if self._log and self._resumed and not found.path:
            self._log.say(f"--resume: no checkpoint in {self.checkpoints}; the run starts at step 0")
        if self._log and found.path:
            for reason in found.damaged:
                self._log.say(f"checkpoint {reason}: damaged, not used; the run resumes from {found.path.name}")

    def end(self, state: TrainState, status: str, reason: str = "") -> RunResult:
        """Last line of the attempt; waits a bounded time for the MLflow shipper. Heartbeats go on until all ranks have come so far, see
        `Processes.meet_at_end`, except after a failure."""
        if status == "failed":
            self.engine.heartbeat.stop()
        self._ended = True
        self.trace.close(state.step)
        rate = matrix_rate(self.engine.device, self.config.engine.precision) if self._log and status != "failed" else None
        return self._close(state, status, reason, rate)

    def _close(self, state: TrainState, status: str, reason: str, rate: float | None = None) -> RunResult:
        recorded = "stopped" if status == "preempted" else status
        reason = reason or {"stopped": f"stop_at={self.config.stop_at}", "preempted": "preempted"}.get(status, "")
        if self._log:
            end = time.monotonic() + 2 * SENDING
            with self.engine.heartbeat.working(lambda: int(min(time.monotonic(), end))):  # the others wait meanwhile
                self._log.end(state, recorded, reason, self.engine.heartbeat.clock.spent(), rate)
        elif self._journal:  # it failed before `start`
            where = {"step": state.step, "progress": state.progress, "starting": since_start(), "world": self.engine.world}
            self._journal.write("end", status=recorded, reason=reason, **where, seconds=state.seconds, images=state.images)
        if self._journal:
            self._journal.close()
        return RunResult(status, self._top1, self.directory)

    def recording_failures(self) -> contextlib.AbstractContextManager[None]:
        """Around the loop, see `Failures.recorded`."""
        return self._failures.recorded(lambda: self._state.step)

    def _failed(self, reason: str) -> None:
        self.end(self._state, "failed", reason)

    def _failed_late(self, reason: str) -> None:
        if not self._ended:  # else the last line is written; a resume ends at once
            self._close(self._state, "failed", reason)

    def _say(self, text: str) -> None:
        """A message of this rank: rank 0 to journal and console, the others to standard output."""
        if self._log:
            self._log.say(text)
        else:
            say(text)
