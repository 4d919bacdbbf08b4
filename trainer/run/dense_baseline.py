"""The dense baseline that a run times itself: at each plateau, dense forward and backward passes beside its own.

Same process, same weights, same batch, interleaved, so that a slow node slows both. The run is not affected: gradients are
computed by `torch.autograd.grad` on the network without DeepSpeed's or DDP's wrapper, so no hook runs, nothing is communicated and
nothing is accumulated; random generators are restored. `DenseBaseline.measure_if_due` returns the journal's `control` line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparsity.network import SparseNetwork
from sparsity.plan_mix import PlanMix
from sparsity.types import DENSE, Plan
from trainer.engine.engine import Engine
from trainer.engine.place_clock import CONTROL
from trainer.model.batch_norm import is_synchronised
from trainer.model.build import cost_of
from trainer.model.objective import Objective
from trainer.model.schedule import Schedule
from trainer.model.teacher import Teacher
from trainer.telemetry import timing
from trainer.telemetry.meters import StepClock

WARM, WATCHED = 5, 20  # steps under a new plan: warm-up, then those that are timed
DRAWN = 4  # times as many of both where steps draw their plan: their times differ by more than noise
FEWEST, MOST = 3, 10  # pairs of passes
COMPILING = 60.0  # s allowed for the first dense pass under torch.compile (DeiT-S on a GPU takes less)
NOTABLE = 0.05  # overhead that is reported, as a share of a dense pass or of a step


class DenseBaseline:
    """Times dense passes once per plateau, within `share` of the training time (0 = never), and beside them the teacher's."""

    def __init__(
        self,
        share: float,
        schedule: Schedule,
        engine: Engine,
        objective: Objective,
        outputs: frozenset[str],
        teacher: Teacher = Teacher(),  # noqa: B008 (no state)
    ):
        self.share, self.engine, self.objective, self.outputs, self.teacher = share, engine, objective, outputs, teacher
        self._ends = [stretch.end for stretch in schedule.stretches()]
        self._plans: PlanMix | None = None
        self._plans_seen: set[Plan] = set()
        self._began = self._from = StepClock(0, 0.0, 0.0)
        self._done, self._reported_short = False, False
        self._spent = 0.0
        self._dense: SparseNetwork | None = None

    def measure_if_due(
        self,
        progress: float,
        steps: int,
        plans: PlanMix,
        clock: StepClock,
        at_hand: tuple[Tensor, Tensor, Tensor],
        ending: bool = False,
    ) -> dict[str, Any] | None:
        """After each step, on all ranks, no collectives: the fields of a `control` line once per plateau, else None.

        progress: epochs done before this step.
        steps: steps in this epoch.
        plans: those that this step and its neighbours draw from.
        clock: of the training steps so far.
        at_hand: a micro-batch: images (b, 3, H, W) float, targets (b, C), rng_keys (b,).
        ending: this step is the last one.
        """
        warm, watched = _window(plans)
        if plans != self._plans:
            lasted, last, self._plans = clock.steps - self._began.steps, self._plans, plans
            short = not self._done and last is not None and not self._reported_short
            self._began, self._done = clock, self.share == 0.0
            self._plans_seen |= {plan for _, plan in plans.parts}
            if short and last is not None:
                self._reported_short = True  # once: a plan that changes every step would report it every step
                return self._not_measured(
                    last, f"the plan changed after {lasted} steps; at least {fewest_steps(len(last.parts) > 1)} are needed"
                )
        passed = clock.steps - self._began.steps
        if ending and not self._done and passed < warm + watched and plans != PlanMix.of(DENSE) and not self._reported_short:
            self._done = True
            return self._not_measured(
                plans,
                f"training ended after {passed + 1} steps under this plan; at least {fewest_steps(len(plans.parts) > 1)} are needed",
            )
        if self._done or passed < warm + watched:
            self._from = clock if passed == warm else self._from
            return None
        self._done = True
        started = time.perf_counter()
        with self.engine.heartbeat.clock.within(CONTROL, clock.steps):
            facts = self._measured(progress, steps, plans, clock, at_hand)
        self._spent += time.perf_counter() - started
        return facts | {"seconds": time.perf_counter() - started}

    def _measured(
        self, progress: float, steps: int, plans: PlanMix, clock: StepClock, at_hand: tuple[Tensor, Tensor, Tensor]
    ) -> dict[str, Any]:
        model: SparseNetwork = self.engine.module
        if self.engine.settings.kind == "deepspeed" and self.engine.settings.zero == 3:
            return self._not_measured(plans, "engine.zero=3 partitions the parameters, so no process can run a pass alone")
        if is_synchronised(model):
            return self._not_measured(
                plans, "model.sync_batchnorm=true communicates in each pass, so no process can run one alone"
            )
        whole = cost_of(model, DENSE)["multiply_adds"]
        shares = {plan: cost_of(model, plan)["multiply_adds"] / whole for _, plan in plans.parts}
        bound = plans.mean(shares.__getitem__)
        watched = clock.steps - self._from.steps
        step = (clock.seconds - self._from.seconds) / watched
        wait = (clock.waited - self._from.waited) / watched
        own_pass = step / self.engine.batch_split.accumulation  # upper bound
        dense = self._dense_network(model)
        compared = plans != PlanMix.of(DENSE) or dense is not model
        end = min([end for end in self._ends if end > progress], default=self._ends[-1])
        allowed = self.share * (clock.seconds + (end - progress) * steps * step) - self._spent
        known = DENSE in self._plans_seen if dense is model else self._dense is not None
        fixed = COMPILING if compared and self.engine.settings.compile and not known else 0.0
        taught = self.teacher.network is not None  # by one of the same size: a third of a pass, it has no backward
        one = own_pass / bound * (sum(shares.values()) + compared + taught / 3)
        pairs = min(MOST, int((allowed - fixed) / one) - 1)  # minus one for the warm-up
        if pairs < FEWEST:
            return self._not_measured(
                plans,
                f"the plateau is too short: control={self.share:g} of the training time allows {max(allowed, 0):.2g} s, "
                f"the passes need {fixed + (FEWEST + 1) * one:.2g} s",
            )
        if dense is not model:
            self._dense = dense
        passes: dict[str, Callable[[], float]] = {
            f"own {number}": partial(self._pass, model, plan, self.outputs, *at_hand) for number, plan in enumerate(shares)
        }
        if compared:
            # the run's own outputs: with them its network is compiled already where a plateau keeps everything
            outputs = self.outputs if dense is model else frozenset[str]()
            passes["dense"] = lambda: self._pass(dense, DENSE, outputs, *at_hand)
        if self.teacher.network is not None:
            images = at_hand[0]
            passes["teacher"] = lambda: timing.seconds(lambda: self.teacher.observe(images, lambda _: None), self.engine.device)
        try:
            times = interleaved(passes, pairs, self.engine.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return self._not_measured(
                plans, "out of device memory in a dense pass over one micro-batch; lower data.micro_batch"
            )
        own = [times.pop(f"own {number}") for number in range(len(shares))]
        times["own"] = [plans.mean(dict(zip(shares, row, strict=True)).__getitem__) for row in zip(*own, strict=True)]
        return journal_fields(plans, bound, times, step, wait, self.engine.batch_split.accumulation)

    def _dense_network(self, model: SparseNetwork) -> SparseNetwork:
        """The network of the dense passes: the run's own. Under `compat: authors`, whose attention is slower than timm's: a second one
        with the same weights and timm's attention, compiled if the run's is."""
        if self._dense is not None:
            return self._dense
        dense = model.dense()
        if dense is model:
            return model
        if self.engine.settings.compile:
            dense.compile()
        return dense

    def _pass(
        self, network: SparseNetwork, plan: Plan, outputs: frozenset[str], images: Tensor, targets: Tensor, rng_keys: Tensor
    ) -> float:
        """Seconds of one forward and backward pass over a micro-batch."""
        parameters = [p for p in network.parameters() if p.requires_grad]

        def one() -> None:
            output = self.engine.forward_unwrapped(network, images, plan, outputs, rng_keys)
            torch.autograd.grad(self.objective.losses(output.logits, targets).mean(), parameters, allow_unused=True)

        return timing.seconds(one, self.engine.device)

    def _not_measured(self, plan: PlanMix, why: str) -> dict[str, Any]:
        return {"keep_tokens": plan.keep_tokens, "keep_connections": plan.keep_connections, "note": f"not measured: {why}"}


def fewest_steps(drawn: bool) -> int:
    """Steps that a plateau must have to be timed, its first one beside those of `_window`; `drawn`: its steps draw their plan."""
    return 1 + (WARM + WATCHED) * (DRAWN if drawn else 1)


def _window(plans: PlanMix) -> tuple[int, int]:
    """Steps under `plans` to warm up, and to time."""
    return (WARM, WATCHED) if len(plans.parts) == 1 else (DRAWN * WARM, DRAWN * WATCHED)


def interleaved(passes: dict[str, Callable[[], float]], pairs: int, device: torch.device) -> dict[str, list[float]]:
    """Each pass once to warm up, then `pairs` rounds; restores the random generators."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return timing.interleave(passes, pairs, warm_up=1)


def journal_fields(
    plan: PlanMix, bound: float, times: dict[str, list[float]], step: float, wait: float, accumulation: int
) -> dict[str, Any]:
    """The measured fields of a `control` line.

    plan: of the own passes.
    bound: multiply-adds, own / dense.
    times: {"own", "dense", "teacher": seconds per pass}; without "dense" if the own passes are, without "teacher" if there is none.
    step, wait: seconds per training step, and of it waiting for data.
    accumulation: micro-batches per step on a rank.
    """
    own, dense = (median(times.get(name, times["own"])) for name in ("own", "dense"))
    teacher = median(times["teacher"]) if "teacher" in times else 0.0
    ratios = [a / b for a, b in zip(times["own"], times.get("dense", times["own"]), strict=True)]
    measured, longer = median(ratios), accumulation * (dense - own)
    # while the own step waits for the loader, the longer passes of a dense step would overlap with that wait
    dense_step = step + (max(longer - wait, 0.0) if longer > 0 else longer)
    about = {
        "keep_tokens": plan.keep_tokens,
        "keep_connections": plan.keep_connections,
        "bound_passes": bound,
        "measured": measured,
        "measured_min": min(ratios),
        "measured_max": max(ratios),
        "pairs": len(ratios),
        "own_ms": 1000 * own,
        "dense_ms": 1000 * dense,
        "step_ms": 1000 * step,
        "data_wait": wait / step,
        "passes_share": accumulation * own / step,
        "step_speedup": max(dense_step, 0.0) / step,
    }
    if teacher:  # a dense step of this run has it too, so it lowers the speedup
        about |= {"teacher_ms": 1000 * teacher, "teacher_share": accumulation * teacher / step}
    return about | {"note": explain_overhead(about)}


def explain_overhead(about: dict[str, Any]) -> str:
    """Why a pass or a step takes longer than its multiply-adds suggest, as text."""
    found = []
    if about["data_wait"] > NOTABLE:
        found.append(f"loader: a step waits for data for {about['data_wait']:.0%} of its time")
    if (small := about["measured"] - about["bound_passes"]) > NOTABLE:
        found.append(
            f"kernel launches, small kernels and operations other than matrix products: a pass takes {about['measured']:.2f} of a "
            f"dense pass, its multiply-adds are {about['bound_passes']:.2f} ({small:+.2f})"
        )
    teacher = about.get("teacher_share", 0.0)
    if teacher > NOTABLE:
        found.append(f"teacher: its passes take {teacher:.0%} of a step, of a dense one too")
    outside = 1 - about["passes_share"] - about["data_wait"] - teacher
    if outside > 3 * NOTABLE:
        found.append(f"engine: {outside:.0%} of a step is outside passes and data wait (optimizer, all-reduce, bookkeeping)")
    return "; ".join(found) or "no significant overhead"


def describe(line: dict[str, Any]) -> str:
    """A `control` line as text for the console."""
    head = f"dense baseline at keep ratios tokens {line['keep_tokens']:.3g}, connections {line['keep_connections']:.3g}: "
    if "measured" not in line:
        return head + line["note"]
    run = (
        f"; run so far: speedup {line['run_speedup']:.3f}x (bound {line['run_bound']:.3f}x)" if line.get("run_speedup") else ""
    )
    return f"{head}a pass takes {line['measured']:.3f} of a dense pass (bound {line['bound_passes']:.3f}){run}; {line['note']}"
