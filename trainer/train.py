"""The training loop: what happens to an image, top to bottom. No callbacks, no trainer class, no host sync between two log lines.

The parts are built in `trainer.run.assembly`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparsity.types import Plan
from trainer.config.run_config import Config
from trainer.data.augment.mixup import Mix, draw_mix, numbers
from trainer.data.batch import Batch
from trainer.engine.engine import Engine
from trainer.engine.place_clock import DATA, STEP, PlaceClock
from trainer.engine.replicas import assert_replicas_equal
from trainer.model.schedule import set_learning_rate
from trainer.run.assembly import Run, assembled
from trainer.run.cadence import reached
from trainer.run.garbage import collect_and_freeze
from trainer.run.recorder import RunResult
from trainer.run.shutdown import Stop


def train(config: Config, resume: bool = False) -> RunResult:
    """Train the run described by `config`, from scratch or from its newest checkpoint (`resume`).

    Raises ConfigError, DataError, EngineError or CheckpointError; the message names the key, the value and the remedy.
    """
    with assembled(config, resume) as run:
        engine, recorder, meters, clock = run.engine, run.recorder, run.meters, run.engine.heartbeat.clock
        state, selection = run.state, run.selection
        if state.pending_evaluation:  # the previous attempt was stopped during its evaluation
            state = run.score(replace(state, pending_evaluation={}), state.pending_evaluation["at"], kept=True)
            if state.pending_evaluation:
                return recorder.end(state, "preempted")
            if state.epoch == config.epochs:
                run.checkpointer.save(state, selection, last=True)
        while state.epoch < config.epochs:
            if state.batch == 0 or selection is None:
                with meters.paused():
                    if not run.probe.observe(state, selection):  # a signal interrupted it: save; the resume probes
                        run.checkpointer.save(state, selection, last=True)
                        return recorder.end(state, "preempted")
                selection = run.examples.select(state.epoch, engine.all_gather)
                engine.assert_same_on_all_ranks(selection.facts["hash"], "the selection of examples")
                run.pruning.begin_epoch(state)
            order = run.stream.order(state.epoch, selection)
            if reached(config.stop_at, state, order.steps):  # resumed a run that had already stopped there
                return recorder.end(state, "stopped")
            recorder.epoch(state, selection, order, len(run.index))
            collect_and_freeze()

            engine.model.train()
            for batch, waited in _timed(run.stream.epoch(state.epoch, selection, state.batch), run.stopping, clock):
                clock.at(STEP, state.step + 1)
                recorder.trace.at(state.step)
                progress = state.epoch + state.batch / order.steps
                plans, lr = run.schedule.plans(progress), run.schedule.lr(progress)
                recorder.plan(state, progress, plans, run.cost)
                last, taken, stop = _step(run, config, state.step, batch, plans.draw(config.seed, state.step), lr)
                meters.end_phase("optimizer")

                meters.end_step(int((batch.weights > 0).sum()), batch.broken, waited)
                before, state = state, state.advanced(order.steps)
                skipped = run.outcomes.add(taken, before)
                due = run.cadence.due(before, state, order.steps, stop=stop, skipped=bool(skipped))
                due = due._replace(log=due.log or run.probe.due(state))  # a signal in it saves; saves follow a log line
                if due.log:
                    skipped += run.outcomes.flush()
                    measured, digest = meters.reduce(), run.chain.close(engine)
                    state = recorder.step(state, measured, digest, engine.grad_norm(), progress=progress, lr=lr, plan=plans)
                    for one in skipped:
                        state = recorder.skipped(one, state, run.chain.digest_before(state.step - one.step - 1))
                with meters.paused():
                    if measured := run.baseline.measure_if_due(progress, order.steps, plans, meters.clock, last, due.end):
                        run.statistics.restore()  # its passes changed them
                        recorder.control(state, progress, measured)
                    if due.evaluate:
                        assert_replicas_equal(engine, run.ema.replicated(), state.step)
                        state = run.score(state, progress, kept=due.save)
                        if state.pending_evaluation:  # a signal interrupted it: save; the resume evaluates
                            due = due._replace(save=True, end=True, status="preempted")
                    if due.save:
                        run.checkpointer.save(state, selection, last=due.end)
                    run.checkpointer.poll()
                if due.end:
                    return recorder.end(state, due.status)
        return recorder.end(state, "finished")  # resumed a run that had already finished


def _step(
    run: Run, config: Config, step: int, batch: Batch, plan: Plan, lr: float
) -> tuple[tuple[Tensor, Tensor, Tensor], bool | Tensor, bool]:
    """One optimizer step, from the batch on the host to the weights and their average; on a GPU the host waits for nothing here.

    Returns the last micro-batch (see `_forward_backward`), whether the step was taken (see `Engine.step`), and whether a stop was requested
    on some rank.
    """
    engine = run.engine
    set_learning_rate(engine.optimizer, lr)
    engine.reseed(config.seed, step)
    mix = draw_mix(config.augment, config.seed, step, config.model.image_size)
    run.chain.add(batch.ids, batch.rng_keys, batch.weights)
    own = torch.stack([batch.weights.sum(), torch.tensor(float(run.stopping.requested()))])
    totals = engine.all_reduce_sum(engine.to_device(own))
    stop = engine.read_delayed(totals[1])
    last = _forward_backward(run, batch, plan, mix, totals[0])
    taken = engine.step()
    run.statistics.after_step(taken)
    run.pruning.after_step(lr, taken)
    run.ema.update(taken)
    return last, taken, stop


def _forward_backward(run: Run, batch: Batch, plan: Plan, mix: Mix, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's slice of the batch, summed over its micro-batches; `total`: weights of all examples of all ranks.

    Returns the last micro-batch: images (b, 3, H, W), targets (b, C), rng_keys (b,).
    """
    engine, meters = run.engine, run.meters
    for part, mixed, last in _micro_batches(batch, mix, engine, meters.end_phase):
        images, targets = run.prepare(part, mixed)
        taught = run.teacher.observe(images, meters.end_phase)
        output = engine.forward(images, plan, run.outputs, part.rng_keys)
        loss = run.results(part, mixed, output, targets, taught, total)
        meters.end_phase("forward")
        engine.backward(loss, last, scaled=True)
        meters.end_phase("backward")
    return images, targets, part.rng_keys


def _micro_batches(
    batch: Batch, mix: Mix, engine: Engine, end_phase: Callable[[str], None]
) -> Iterator[tuple[Batch, Mix, bool]]:
    """This rank's slice of the batch as micro-batches on the device, each with the mix of the step, and whether it is the last."""
    rows, size = len(batch.labels), engine.batch_split.micro_batch
    for start in range(0, rows, size):
        end_phase("rest")
        *fields, mixed = engine.upload([*(field[start : start + size] for field in batch[:-1]), numbers(mix)])
        end_phase("host_to_device")
        yield Batch(*fields, broken=batch.broken), mix._replace(numbers=mixed), start + size >= rows


def _timed(batches: Iterable[Batch], stopping: Stop, clock: PlaceClock) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds spent waiting for it; the wait is bounded after a stop was requested."""
    iterator = iter(batches)
    while True:
        started = time.perf_counter()
        with stopping.waiting_for_data(), clock.within(DATA, clock.step):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started
