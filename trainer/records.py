"""What a run tells: journal, console, MLflow's shipper, weights. Rank 0 speaks, the other ranks keep silent through the same calls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain as joined
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.types import Plan, Selection
from sparsity.vit import SparseViT
from trainer import artifacts, kept, report, run, skips
from trainer.checkpoint import Found, TrainState
from trainer.config import Config
from trainer.console import Console
from trainer.control import told
from trainer.data.index import Index
from trainer.data.order import EpochOrder
from trainer.data.shards import DataError
from trainer.engine import Engine
from trainer.evaluate import Scores
from trainer.journal import Journal, lineage
from trainer.machine import matrix_rate, since_start
from trainer.meters import Window
from trainer.savings import savings, savings_of
from trainer.shipper import Shipper, start
from trainer.totals import Totals
from trainer.trace import Trace
from trainer.weights import save_weights

LISTED = 64  # leftover ids written out in a line; beyond, their number


class Ended(NamedTuple):
    """How a run ended: "finished", "stopped" (at `stop_at`) or "preempted" (by a signal; a resume goes on), and its last score."""

    status: str
    top1: float
    directory: Path


class Records:
    """The record of one attempt. Methods that take a TrainState and return one carry what they counted forward."""

    def __init__(self, config: Config, engine: Engine, resume: bool):
        """Claim the run directory. Raises ConfigError on all ranks where it exists and `resume` is off."""
        self.config, self.engine = config, engine
        self.directory = config.directory()
        self.checkpoints = self.directory / "checkpoints"
        self._journal: Journal | None = None
        self._console: Console | None = None
        self._shipper: Shipper | None = None
        self._plan: Plan | None = None
        self._state = TrainState()
        self._top1, self._examples = float("nan"), 0
        self._totals: Totals | None = None
        failure: Exception | None = None
        if engine.is_main:
            try:
                run.claim(config, resume)
                self._journal = Journal(self.directory)
            except Exception as error:
                failure = error
        if (failure := engine.share(failure)) is not None:  # a pickled copy on the other ranks, so that none of them waits
            raise failure
        run.log_to(self.directory / "logs" / f"rank-{engine.rank}.txt")
        self.attempt = int(engine.share(self._journal.attempt if self._journal else 0))
        self.trace = Trace(config.trace, self.directory, engine.rank, engine.on_gpu, self._say)

    def _say(self, text: str) -> None:
        """A message of this rank: into the journal, to the person; of another rank than 0 to standard output."""
        if self._journal is None or self._console is None:
            print(text, flush=True)
        else:
            self._journal.write("message", text=text)
            self._console.message(text)

    def start(self, state: TrainState, data: dict[str, Index], model: SparseViT, cost: dict[str, Any]) -> None:
        """First lines of the attempt; collective."""
        self._state, self._examples = state, len(data["train"])
        hosts = sorted(set(self.engine.everyones([os.uname().nodename])))
        rate = torch.tensor(matrix_rate(self.engine.device, self.config.engine.precision), dtype=torch.float64)
        rate = float(self.engine.sum(rate.to(self.engine.device)))
        if self._journal is None:
            return
        living = since_start()
        self._totals = Totals(self.directory, self.attempt, self.engine.world, living, rate)
        about = artifacts.start_line(self.config, self.engine, data, model)
        self._journal.write(
            "start", **about, hosts=hosts, matrix_tflops=rate / self.engine.world / 1e12, starting=living, **cost
        )
        if self.attempt:
            self._journal.write("resume", epoch=state.epoch, batch=state.batch, step=state.step)
        until = self.config.epochs
        self._console = Console(self.config.name, until, start=float(state.epoch))
        if state.step:
            self._console.message(
                f"{self.config.name}: goes on at epoch {state.epoch}, batch {state.batch} (step {state.step})"
            )
        try:
            artifacts.write(self.directory, self.config, model)
        except OSError as error:
            self._say(f"{self.directory}: environment.txt and plan.md could not be written: {error}")
        if self.config.tracking.to == "mlflow":
            self._shipper = start(self.directory, self.config.tracking)

    def epoch(self, state: TrainState, selection: Selection, order: EpochOrder, examples: int) -> None:
        if self._journal is None or self._console is None or self._totals is None:
            return
        self._totals.kept = selection.num_kept / max(examples, 1)
        leftover = order.leftover()
        self._keep(selection)
        self._journal.write(
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
        self._console.epoch(kept=selection.num_kept, examples=examples)

    def _keep(self, selection: Selection) -> None:
        """The list of the epoch to disk, for replay and audit; where there is no room the run goes on without, and says so."""
        try:
            kept.write(self.directory, selection)
        except OSError as error:
            self._say(
                f"the kept list {selection.facts['hash']} could not be written ({error}): its epochs can't be replayed or audited"
            )

    def plan(self, state: TrainState, progress: float, plan: Plan, cost_of: Callable[[Plan], dict[str, Any]]) -> None:
        """A line where the plan changes; `cost_of` gives tokens per block and multiply-adds under it."""
        if self._journal is None or self._totals is None or plan == self._plan:
            return
        self._plan, self._totals.cost = plan, cost_of(plan)
        self._journal.write(
            "plateau",
            epoch=state.epoch,
            step=state.step,
            progress=progress,
            keep_tokens=plan.keep_tokens,
            keep_connections=plan.keep_connections,
            **self._totals.cost,
        )

    def control(self, state: TrainState, progress: float, facts: dict[str, Any]) -> None:
        """A line of the dense control, with what the run saved so far."""
        if self._journal is None or self._console is None:
            return
        line = {"epoch": state.epoch, "step": state.step, "progress": progress, **facts}
        if "measured" in facts:
            so_far = savings(joined(lineage(self.directory), [{"kind": "control", **line}]))
            line["bound"] = facts["bound_passes"] * so_far.kept
            line |= {"run_speedup": so_far.speedup, "run_bound": so_far.bound, "timed": so_far.timed}
        self._journal.write("control", **line)
        self._console.message(told(line))

    def step(self, state: TrainState, window: Window, chain: str, norm: float, **facts: Any) -> TrainState:
        """A log line; the broken images of the window go to the ledger. Raises DataError past `data.broken_share`."""
        meters, broken = window.facts, window.broken
        state = replace(
            state,
            images=state.images + int(meters["images"]),
            seconds=state.seconds + meters["seconds"],
            chain=chain,
            broken=state.broken | {str(k): v for k, v in broken.items()},
        )
        self._state = state
        if self._journal is not None and self._console is not None and self._totals is not None:
            for number, reason in broken.items():
                self._journal.write("broken", epoch=state.epoch, batch=state.batch, step=state.step, id=number, reason=reason)
                self._console.message(f"broken image {number}: {reason}; it counts for nothing in the loss, the run goes on")
            where = {"epoch": state.epoch, "batch": state.batch, "step": state.step}
            line = where | facts | meters | self._totals.of(window, state.seconds)
            line |= {"grad_norm": norm, "chain": chain, "seconds_total": state.seconds, "images_total": state.images}
            self._journal.write("step", **line)
            self._console.step(**line)
            if window.ranks:
                self._journal.write("ranks", step=state.step, **window.ranks)
            if window.nodes:
                self._journal.write("system", step=state.step, **window.nodes)
        self._refuse_broken(state)
        return state

    def skipped(self, before: TrainState, state: TrainState, seen: str) -> TrainState:
        """The step from `before` to `state` was not taken; its batch has the digest `seen`. Raises EngineError where there are too
        many of them, see `skips`."""
        state = self._state = replace(state, skipped=[*state.skipped, state.step])
        if self._journal is not None and self._console is not None:
            line = skips.facts(before.epoch, before.batch, seen, state.skipped)
            self._journal.write("skipped", **line)
            self._console.message(skips.told(line, self.directory))
        skips.refuse_too_many(state.skipped, self.config.optim, self.directory)
        return state

    def _refuse_broken(self, state: TrainState) -> None:
        """Raises DataError where more images are broken than `data.broken_share` of the data set."""
        allowed, examples = self.config.data.broken_share, self._examples
        if len(state.broken) > allowed * examples:
            some = "; ".join(list(state.broken.values())[:3])
            raise DataError(
                f"{len(state.broken)} of {examples} images are broken, more than data.broken_share={allowed}: {some}. "
                "`trilevel verify SHARDS` lists them all; pack again without them, or raise data.broken_share"
            )

    def scored(
        self, state: TrainState, results: list[tuple[bool, Scores]], progress: float, plan: Plan, saving: bool
    ) -> TrainState:
        """Lines of an evaluation; the last result is the score of the run. `saving`: this state is kept, so it may be the best one."""
        for ema, scores in results:
            if self._journal is not None and self._console is not None:
                facts = {"epoch": state.epoch, "step": state.step, "progress": progress, "ema": ema, **scores._asdict()}
                facts["per_class"] = [round(accuracy, 4) for accuracy in scores.per_class]
                self._journal.write("eval", **facts, keep_tokens=plan.keep_tokens, keep_connections=plan.keep_connections)
                self._console.eval(top1=scores.top1, ema=ema)
        self._top1 = results[-1][1].top1
        better = saving and self._top1 > state.best
        return replace(state, best=self._top1, best_step=state.step) if better else state

    def weights(self, weights: dict[str, Tensor]) -> None:
        """The deployable weights of the run, under timm's names."""
        save_weights(self.directory / "weights.safetensors", weights)

    def sync(self) -> None:
        """Bring the lines of the journal to the disk."""
        if self._journal is not None:
            self._journal.sync()

    def saved(self, state: TrainState, path: Path, blocking: float, seconds: float) -> None:
        """A checkpoint is durable; training stood still for `blocking` seconds, writing took `seconds`."""
        if self._journal is not None:
            size = sum(file.stat().st_size for file in path.iterdir())
            where = {
                "epoch": state.epoch,
                "batch": state.batch,
                "step": state.step,
                "path": str(path.relative_to(self.directory)),
            }
            self._journal.write("checkpoint", **where, bytes=size, blocking=blocking, seconds=seconds)

    def passed_over(self, found: Found) -> None:
        """Say which checkpoints were too damaged to go on from."""
        if self._journal is None or self._console is None or found.path is None:
            return
        for reason in found.damaged:
            text = f"checkpoint {reason}: it is damaged and not used, the run goes on from {found.path.name}"
            self._journal.write("message", text=text)
            self._console.message(text)

    def end(self, state: TrainState, status: str, reason: str = "") -> Ended:
        """Last line of the attempt; the shipper gets a bounded time to send the rest."""
        self.trace.close(state.step)
        if self._journal is not None:
            told = "stopped" if status == "preempted" else status
            reason = reason or {"stopped": f"stop_at={self.config.stop_at}", "preempted": "preempted"}.get(status, "")
            so_far = self._totals.so_far(state.seconds) if self._totals else {}
            saved = savings_of(self.directory)
            self._journal.write(
                "end",
                status=told,
                reason=reason,
                step=state.step,
                seconds=state.seconds,
                images=state.images,
                **so_far,
                run_speedup=saved.speedup,
                run_bound=saved.bound,
                timed=saved.timed,
            )
            try:
                report.write(self.directory)
            except (
                Exception
            ) as error:  # table and picture can be made again, by `trilevel report`; a run must not fail over them
                print(f"no report: {error}; try `trilevel report {self.directory}`")
            if self._console is not None:
                self._console.close()
            if self._shipper is not None and (said := self._shipper.finish(timeout=60).message):
                print(said)
            self._journal.close()
        return Ended(status, self._top1, self.directory)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Around the loop: a failure is the attempt's last line before it goes on up."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(Exception):
                self.end(self._state, "failed", reason=f"{type(error).__name__}: {error}")
            raise
