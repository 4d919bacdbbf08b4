"""Evaluations of a run: the weights and their average, under the current plan and at the densities of `evaluate.densities`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from sparsity.types import Plan
from trainer.checkpoint.state import TrainState
from trainer.engine.engine import Engine
from trainer.engine.place_clock import EVALUATION
from trainer.model.ema import Ema
from trainer.model.evaluate import Evaluated, Scores
from trainer.model.schedule import Schedule
from trainer.run.recorder import Recorder
from trainer.run.shutdown import Stop


class _Interrupted(Exception):
    """All ranks left an evaluation because a stop was requested."""


class Scoring:
    """Evaluates on all ranks and records the results.

    measure: `evaluate` of this run, which still needs a plan and `between`, called between two batches.
    densities: those evaluated beside the plan of the moment.
    network: whose weights the average replaces for its own evaluation.
    """

    def __init__(
        self,
        measure: Callable[..., Scores],
        schedule: Schedule,
        densities: Sequence[float],
        engine: Engine,
        recorder: Recorder,
        stopping: Stop,
        ema: Ema,
        network: nn.Module,
    ):
        self.measure, self.schedule, self.densities = measure, schedule, densities
        self.engine, self.recorder, self.stopping = engine, recorder, stopping
        self.ema, self.network = ema, network

    def __call__(self, state: TrainState, at: float, *, kept: bool) -> TrainState:
        """Collective. Evaluate under the plan at progress `at` (epochs); kept: whether a checkpoint of this step follows.

        A requested stop discards the results: the state returned has `pending_evaluation` set, and the resume evaluates again.
        """
        with self.engine.heartbeat.clock.within(EVALUATION, state.step):
            plans = [(self.schedule.plan(at), False), *((Plan(density), True) for density in self.densities)]
            self.engine.model.eval()
            try:
                results = self._measured(plans, average=False)
                if self.ema.decay is not None:
                    with self.ema.applied(self.network):
                        results += self._measured(plans, average=True)
            except _Interrupted:
                return replace(state, pending_evaluation={"at": at})
            self.engine.model.train()
            return self.recorder.scored(state, results, state.progress, kept)

    def _measured(self, plans: list[tuple[Plan, bool]], average: bool) -> list[Evaluated]:
        return [Evaluated(average, plan, self.measure(plan, between=self._agree), beside) for plan, beside in plans]

    def _agree(self) -> None:
        """Collective, between two batches: leave together once a stop was requested on any rank."""
        requested = torch.full(
            (), float(self.stopping.requested()), device=self.engine.device
        )  # filled there: no copy to wait for
        if self.engine.read_delayed(self.engine.all_reduce_sum(requested)):
            raise _Interrupted
