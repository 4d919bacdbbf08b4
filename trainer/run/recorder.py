"""The record of an attempt, on all ranks: counts and agrees on what is recorded; `RankZeroLog` writes it on rank 0."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
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
from trainer.engine.errors import LATE
from trainer.engine.heartbeat import REPORTING
from trainer.journal.writer import Journal
from trainer.model.evaluate import Evaluated
from trainer.model.weights import save_weights
from trainer.run import broken_images, nonfinite_steps
from trainer.run import directory as run
from trainer.run.rank_zero import SENDING, RankZeroLog
from trainer.storage.disk import Content, Disk
from trainer.storage.exit_code import write_exit_code
from trainer.storage.process_age import since_start
from trainer.storage.standard_streams import say
from trainer.telemetry.efficiency import Efficiency
from trainer.telemetry.hardware import matrix_rate
from trainer.telemetry.meters import MeterReading
from trainer.telemetry.profiler import Trace

# the words of gloo and NCCL where another process has ended
_PEER_GONE = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|remote process (has )?(exited|terminated)|Application timeout", re.I
)


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
        self.trace = Trace(config.trace, self.directory, engine.rank, engine.on_gpu, self._say)
        self._ended = False  # its last line is written
        self._failing = threading.Lock()  # of the first thread that records the failure
        engine.heartbeat.on_late = self._late

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

    def report_damaged(self, found: Newest) -> None:
        """Report the damaged checkpoints that the resume did not use."""
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
            began = time.monotonic()
            with self.engine.heartbeat.working(
                lambda: min(int(time.monotonic() - began), 2 * SENDING)
            ):  # the others wait meanwhile
                self._log.end(state, recorded, reason, self.engine.heartbeat.clock.spent(), rate)
        elif self._journal:  # it failed before `start`
            where = {"step": state.step, "progress": state.progress, "starting": since_start()}
            self._journal.write("end", status=recorded, reason=reason, **where, seconds=state.seconds, images=state.images)
        if self._journal:
            self._journal.close()
        return RunResult(status, self._top1, self.directory)

    @contextlib.contextmanager
    def recording_failures(self) -> Iterator[None]:
        """Around the loop: writes an exception to this rank's log and as the attempt's last line, then re-raises it. The line begins with
        the cause of the rank that failed first: the others fail because its connections close."""
        try:
            yield
        except BaseException as error:
            if not self._failing.acquire(blocking=False):
                time.sleep(REPORTING)  # the watch of collectives is reporting, then it ends this process
            logging.getLogger("trilevel").error("failed at step %d", self._state.step, exc_info=error)
            own = f"{type(error).__name__}: {error}"
            own = f"rank {self.engine.rank}: {own}" if self.engine.world > 1 else own
            first = self._first_failure(error, own)
            self.engine.heartbeat.stop()
            if self._journal and first != own:
                say(
                    f"trilevel: {first}\n  The run failed there first; the logs of all ranks: {self.directory / 'logs'}",
                    error=True,
                )
            with contextlib.suppress(Exception):
                self.end(self._state, "failed", reason=first if first == own else f"{first}; then {own}")
            if self.engine.is_main:  # below the traceback, whose last line is the cause
                error.add_note(run.how_to_continue(self.directory, self.engine.world))
            raise

    def _first_failure(self, error: BaseException, own: str) -> str:
        """The cause of the rank that failed first. A rank that was killed has left none: then those whose connections it closed name it."""
        gone = ""
        if _PEER_GONE.search(str(error)) and not self.engine.first_failure("", self.attempt):
            gone = self.engine.heartbeat.gone()
        return self.engine.first_failure(gone or own, self.attempt)

    def _late(self, text: str) -> None:
        """A collective does not complete, see `heartbeat`: writes the stacks to this rank's log and the last line of the attempt. In the
        thread of the watch; the main thread is blocked, and the process ends after this."""
        if not self._failing.acquire(blocking=False):
            return time.sleep(REPORTING)  # the main thread has raised and ends this process
        run.log_stacks(text)
        own = f"rank {self.engine.rank}: {text}"
        first = self.engine.first_failure(own, self.attempt)
        if first == own or self.engine.is_main:
            say(f"trilevel: {first}", error=True)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(REPORTING / 2)  # let the checkpoint in progress reach the disk
        if not self._ended:  # else the last line is written; a resume ends at once
            with contextlib.suppress(Exception):
                self._close(self._state, "failed", first)
        return write_exit_code(LATE)

    def _say(self, text: str) -> None:
        """A message of this rank: rank 0 to journal and console, the others to standard output."""
        if self._log:
            self._log.say(text)
        else:
            say(text)
