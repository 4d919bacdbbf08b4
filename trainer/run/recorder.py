"""What a run tells, on all ranks: what is counted and agreed is here, what rank 0 writes of it is the `RankZeroLog`'s."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.types import Plan, Selection
from sparsity.vit import SparseViT
from trainer.checkpoint.directory import Newest
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.errors import DataError
from trainer.data.order import EpochOrder
from trainer.data.shards.index import Index
from trainer.engine.engine import Engine
from trainer.journal.reader import FILE
from trainer.journal.writer import Journal
from trainer.model.evaluate import Scores
from trainer.model.weights import save_weights
from trainer.run import directory as run
from trainer.run import nonfinite_steps
from trainer.run.rank_zero import RankZeroLog
from trainer.storage.standard_streams import say
from trainer.telemetry.efficiency import Efficiency
from trainer.telemetry.hardware import matrix_rate, since_start
from trainer.telemetry.meters import MeterReading
from trainer.telemetry.profiler import Trace


class RunResult(NamedTuple):
    """How a run ended: "finished", "stopped" (at `stop_at`) or "preempted" (by a signal; a resume goes on), and its last score."""

    status: str
    top1: float
    directory: Path


class Recorder:
    """The record of one attempt. Methods that take a TrainState and return one carry what they counted forward."""

    def __init__(self, config: Config, engine: Engine, resume: bool):
        """Claim the run directory. Raises ConfigError on all ranks where it exists and `resume` is off."""
        self.config, self.engine = config, engine
        self.directory = config.directory()
        self.checkpoints = self.directory / "checkpoints"
        self._journal: Journal | None = None  # of rank 0
        self._log: RankZeroLog | None = None  # of rank 0, from `start` on
        self._plan: Plan | None = None
        self._state = TrainState()
        self._top1, self._examples = float("nan"), 0
        failure: Exception | None = None
        if engine.is_main:
            try:
                if (
                    resume and (self.directory / FILE).exists()
                ):  # refuses a run that lives, before its config.yaml is written over
                    self._journal = Journal(self.directory)
                run.create_run_directory(config, resume)
                self._journal = self._journal or Journal(self.directory)
            except Exception as error:
                failure = error
        if (
            failure := engine.broadcast_object(failure)
        ) is not None:  # a pickled copy on the other ranks, so that none of them waits
            raise failure
        run.log_to(self.directory / "logs" / f"rank-{engine.rank}.txt")
        self.attempt = int(engine.broadcast_object(self._journal.attempt if self._journal else 0))
        self.trace = Trace(config.trace, self.directory, engine.rank, engine.on_gpu, self._say)

    def start(self, state: TrainState, data: dict[str, Index], model: SparseViT, cost: dict[str, Any]) -> None:
        """First lines of the attempt; collective."""
        self._state, self._examples = state, len(data["train"])
        hosts = sorted(set(self.engine.all_gather_objects([os.uname().nodename])))
        rate = torch.tensor(matrix_rate(self.engine.device, self.config.engine.precision), dtype=torch.float64)
        rate = float(self.engine.all_reduce_sum(rate.to(self.engine.device)))
        if self._journal is None:
            return
        living = since_start()
        efficiency = Efficiency(self.directory, self.attempt, self.engine.world, living, rate)
        self._log = RankZeroLog(self.config, self._journal, efficiency, state)
        facts = {"hosts": hosts, "matrix_tflops": rate / self.engine.world / 1e12, "starting": living, **cost}
        self._log.start(state, self.engine, data, model, facts)

    def epoch(self, state: TrainState, selection: Selection, order: EpochOrder, examples: int) -> None:
        """What the epoch shows."""
        if self._log:
            self._log.epoch(state, selection, order, examples)

    def plan(self, state: TrainState, progress: float, plan: Plan, cost_of: Callable[[Plan], dict[str, Any]]) -> None:
        """A line where the plan changes; `cost_of` gives tokens per block and multiply-adds under it."""
        if self._log and plan != self._plan:
            self._plan = plan
            self._log.plan(state, progress, plan, cost_of(plan))

    def control(self, state: TrainState, progress: float, facts: dict[str, Any]) -> None:
        """A line of the dense control, with what the run saved so far."""
        if self._log:
            self._log.control(state, progress, facts)

    def step(
        self, state: TrainState, reading: MeterReading, chain: str, norm: float, *, progress: float, lr: float, plan: Plan
    ) -> TrainState:
        """A log line; the broken images of the window go to the ledger. Raises DataError past `data.broken_share`."""
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
            self._log.step(state, reading, grad_norm=norm, **facts)
        self._refuse_broken(state)
        return state

    def skipped(self, before: TrainState, state: TrainState, seen: str) -> TrainState:
        """The step from `before` to `state` was not taken; its batch has the digest `seen`. Raises EngineError where there are too
        many of them, see `nonfinite_steps`."""
        state = self._state = replace(state, skipped=[*state.skipped, state.step])
        if self._log:
            self._log.skipped(nonfinite_steps.journal_line(before.epoch, before.batch, seen, state.skipped))
        nonfinite_steps.refuse_too_many(state.skipped, self.config.optim, self.directory)
        return state

    def scored(
        self, state: TrainState, results: list[tuple[bool, Scores]], progress: float, plan: Plan, saving: bool
    ) -> TrainState:
        """Lines of an evaluation; the last result is the score of the run. `saving`: this state is kept, so it may be the best one."""
        if self._log:
            self._log.scored(state, results, progress, plan)
        self._top1 = results[-1][1].top1
        better = saving and self._top1 > state.best
        return replace(state, best=self._top1, best_step=state.step) if better else state

    def weights(self, weights: dict[str, Tensor]) -> None:
        """The deployable weights of the run, under timm's names."""
        save_weights(self.directory / "weights.safetensors", weights)

    def sync(self) -> None:
        """Bring the lines of the journal to the disk."""
        if self._journal:
            self._journal.sync()

    def saved(self, state: TrainState, path: Path, blocking: float, seconds: float) -> None:
        """A checkpoint is durable; training stood still for `blocking` seconds, writing took `seconds`."""
        if self._log:
            self._log.saved(state, path, blocking, seconds)

    def report_damaged(self, found: Newest) -> None:
        """Say which checkpoints were too damaged to go on from."""
        if self._log and found.path:
            for reason in found.damaged:
                self._log.say(f"checkpoint {reason}: it is damaged and not used, the run goes on from {found.path.name}")

    def end(self, state: TrainState, status: str, reason: str = "") -> RunResult:
        """Last line of the attempt; the shipper gets a bounded time to send the rest."""
        self.trace.close(state.step)
        said = "stopped" if status == "preempted" else status
        reason = reason or {"stopped": f"stop_at={self.config.stop_at}", "preempted": "preempted"}.get(status, "")
        if self._log:
            self._log.end(state, said, reason)
        elif self._journal:  # it failed before it had begun
            self._journal.write("end", status=said, reason=reason, step=state.step, seconds=state.seconds, images=state.images)
        if self._journal:
            self._journal.close()
        return RunResult(status, self._top1, self.directory)

    @contextlib.contextmanager
    def recording_failures(self) -> Iterator[None]:
        """Around the loop: a failure is the attempt's last line before it goes on up."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(Exception):
                self.end(self._state, "failed", reason=f"{type(error).__name__}: {error}")
            raise

    def _say(self, text: str) -> None:
        """A message of this rank: into the journal, to the person; of another rank than 0 to standard output."""
        if self._log:
            self._log.say(text)
        else:
            say(text)

    def _refuse_broken(self, state: TrainState) -> None:
        """Raises DataError where more images are broken than `data.broken_share` of the data set."""
        allowed, examples = self.config.data.broken_share, self._examples
        if len(state.broken) > allowed * examples:
            some = "; ".join(list(state.broken.values())[:3])
            raise DataError(
                f"{len(state.broken)} of {examples} images are broken, more than data.broken_share={allowed}: {some}. "
                "`trilevel verify SHARDS` lists them all; pack again without them, or raise data.broken_share"
            )
