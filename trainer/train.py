"""The training loop: what happens to an image, top to bottom. No callbacks, no trainer class, no host sync between two log lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from sparsity.types import DENSE, Plan
from trainer.checkpoint import save_load
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.augment.mixup import draw_mix, mix_images
from trainer.data.augment.on_device import augment_on_device
from trainer.data.batch import Batch
from trainer.data.loader.build import clean_images, training_stream, validation_set
from trainer.data.loader.dataset import check_classes, open_indexes
from trainer.data.order import micro_batches
from trainer.engine.engine import Engine
from trainer.engine.environment import is_first_of_node, rank, use_device_of_rank, world_size
from trainer.engine.place_clock import DATA, EVALUATION, STEP, PlaceClock
from trainer.engine.replicas import assert_replicas_equal
from trainer.model.build import (
    build_distillation,
    build_examples,
    build_model,
    build_objective,
    build_pruning,
    build_schedule,
    cost_of,
)
from trainer.model.ema import Ema
from trainer.model.evaluate import Evaluated, Scores, evaluate
from trainer.model.optimizer import build_optimizer
from trainer.model.schedule import Schedule, set_learning_rate
from trainer.model.teacher import build_teacher
from trainer.provenance.hash_chain import HashChain
from trainer.run.cadence import Cadence, reached
from trainer.run.checkpointer import Checkpointer
from trainer.run.dense_baseline import DenseBaseline
from trainer.run.example_probe import ExampleProbe
from trainer.run.ineffective import refuse_ineffective, warnings_of
from trainer.run.process_limits import check_limits
from trainer.run.recorder import Recorder, RunResult
from trainer.run.shutdown import Stop, install_handlers
from trainer.run.weight_pruning import WeightPruning
from trainer.telemetry.meters import Meters


def train(config: Config, resume: bool = False) -> RunResult:
    """Train the run described by `config`, from scratch or from its newest checkpoint (`resume`).

    Raises ConfigError, DataError, EngineError or CheckpointError; the message names the key, the value and the remedy.
    """
    refuse_ineffective(config, resume)
    torch.set_float32_matmul_precision("highest" if config.engine.precision == "float32" else "high")
    check_limits(config.data.workers, world_size())
    index, validation_index = open_indexes(config.data, verify=is_first_of_node())
    check_classes(index, validation_index)
    model, examples, objective = build_model(config), build_examples(config, index), build_objective(config)
    warnings = warnings_of(config, model.vit, index, validation_index)
    schedule, distillation, weights = build_schedule(config), build_distillation(config), build_pruning(config, model)
    teacher = build_teacher(config, model, distillation.teacher_outputs)
    cadence = Cadence(
        config.epochs, config.stop_at, config.log_every, evaluate=config.evaluate.every, save=config.checkpoint.every
    )
    batch_split = micro_batches(config.data.batch, config.data.micro_batch, world_size())
    stopping = install_handlers()
    stream = training_stream(index, config, rank(), world_size())
    validation = validation_set(validation_index, config, rank(), world_size())
    probe_settings = config.examples.probe
    clean = probe_settings and clean_images(index, config, rank(), world_size(), probe_settings.probe_share)
    use_device_of_rank()
    for loader in (stream, validation, clean):  # before the threads of the engine exist
        if loader is not None:
            loader.fork()
    engine = Engine(config.engine, batch_split, config.optim.clip)
    clock = engine.heartbeat.clock
    found = save_load.newest(config.directory() / "checkpoints") if resume else save_load.NOTHING
    saved = save_load.load(found.path, config, index.fingerprint, teacher.hash) if found.path else None
    engine.assert_same_on_all_ranks(
        f"step {saved.state.step}, {saved.state.chain}" if saved else "none", "the checkpoint to resume from"
    )
    engine.assert_same_on_all_ranks(teacher.hash, "the teacher's weights")

    recorder = Recorder(config, engine, resume)
    with engine.released_afterwards(), recorder.recording_failures():
        if saved:
            model.vit.load_state_dict(saved.weights)  # before `prepare`: ZeRO's master weights are copies of these
        engine.prepare(model, build_optimizer(model, config.optim))
        teacher.prepare(engine)
        ema = Ema(model.vit, config.optim.ema)
        if saved:
            engine.state.load(saved.weights, saved.optimizer)
            ema.load_state_dict(saved.ema)
            examples.load_state_dict(saved.examples)
        pruning = WeightPruning(weights, engine, model, ema, recorder, saved.pruning if saved else {})
        state = replace(saved.state if saved else TrainState(), attempt=recorder.attempt)
        selection = saved.selection if saved else None
        chain, meters = HashChain(state.chain), Meters(engine, distillation.parts)
        probe = ExampleProbe(config, index, engine, objective, examples, recorder, stopping, clean)
        outputs = frozenset({"cls_attention"} if examples.wants_spread and not probe.on else ()) | distillation.outputs
        baseline = DenseBaseline(config.control, schedule, engine, objective, outputs, teacher)
        facts = cost_of(model, DENSE) | teacher.facts() | {"warnings": warnings}
        recorder.start(state, {"train": index, "validation": validation_index}, model, facts)
        recorder.report_damaged(found)
        known = {"config": config, "fingerprint": index.fingerprint, "teacher": teacher.hash}  # a resume must match them
        store = partial(save_load.save_checkpoint, recorder.checkpoints, **known)
        checkpointer = Checkpointer(
            store, config.checkpoint.asynchronous, engine, recorder, stopping, ema, examples, pruning.state_dict
        )
        classes, augment = config.model.classes, config.augment
        measure = partial(
            evaluate,
            engine.forward,
            validation,
            classes=classes,
            augment=augment,
            device=engine.device,
            add_up=engine.all_reduce_sum,
        )
        score = partial(_scored, measure, schedule, config.evaluate.densities, engine, recorder, stopping, ema, model.vit)

        if state.pending_evaluation:  # the previous attempt was stopped during its evaluation
            with clock.within(EVALUATION, state.step):
                state = score(replace(state, pending_evaluation={}), state.pending_evaluation["at"], kept=True)
            if state.pending_evaluation:
                return recorder.end(state, "preempted")
            if state.epoch == config.epochs:
                checkpointer.save(state, selection, last=True)
        while state.epoch < config.epochs:
            if state.batch == 0 or selection is None:
                with meters.paused():
                    if not probe.observe(state, selection):  # a signal interrupted it: save; the resume probes
                        checkpointer.save(state, selection, last=True)
                        return recorder.end(state, "preempted")
                selection = examples.select(state.epoch, engine.all_gather)
                engine.assert_same_on_all_ranks(selection.facts["hash"], "the selection of examples")
                pruning.begin_epoch(state)
            order = stream.order(state.epoch, selection)
            if reached(config.stop_at, state, order.steps):  # resumed a run that had already stopped there
                return recorder.end(state, "stopped")
            recorder.epoch(state, selection, order, len(index))

            engine.model.train()
            for batch, waited in _timed(stream.epoch(state.epoch, selection, state.batch), stopping, clock):
                clock.at(STEP, state.step + 1)
                recorder.trace.at(state.step)
                progress = state.epoch + state.batch / order.steps
                plans, lr = schedule.plans(progress), schedule.lr(progress)
                plan = plans.draw(config.seed, state.step)
                recorder.plan(state, progress, plans, partial(cost_of, model))
                set_learning_rate(engine.optimizer, lr)
                engine.reseed(config.seed, state.step)
                mix = draw_mix(config.augment, config.seed, state.step, config.model.image_size)
                chain.add(batch.ids, batch.rng_keys, batch.weights)
                totals = engine.all_reduce_sum(
                    torch.stack([batch.weights.sum(), torch.tensor(float(stopping.requested()))]).to(engine.device)
                )
                total, stop = totals[0].clamp(min=1e-12), engine.read_delayed(totals[1])

                for part, last in _micro_batches(batch, batch_split.micro_batch, engine.device, meters.end_phase):
                    images = mix_images(augment_on_device(part, config.augment), mix, part.weights)
                    targets = objective.targets(part.labels, mix, part.weights)
                    taught = teacher.observe(images, meters.end_phase)
                    output = engine.forward(images, plan, outputs, part.rng_keys)
                    losses, parts = distillation(objective.losses(output.logits, targets), output, taught)
                    meters.end_phase("forward")
                    engine.backward((losses * part.weights).sum() / total, last)
                    meters.end_phase("backward")
                    credited, observation = objective.credit(part, output, losses, mix)
                    if not probe.on:
                        examples.observe(credited, observation)
                    meters.add(losses, part.weights, observation, parts)
                if taken := engine.step():
                    pruning.after_step(lr)
                    ema.update(model.vit)
                meters.end_phase("optimizer")

                meters.end_step(int((batch.weights > 0).sum()), batch.broken, waited)
                before, state = state, state.advanced(order.steps)
                due = cadence.due(before, state, order.steps, stop=stop, skipped=not taken)
                due = due._replace(log=due.log or probe.due(state))  # a signal in the probe saves, and saves follow a log line
                if due.log:
                    state = recorder.step(
                        state, meters.reduce(), chain.close(engine), engine.grad_norm(), progress=progress, lr=lr, plan=plans
                    )
                    if not taken:
                        state = recorder.skipped(before, state, chain.last)
                with meters.paused():
                    if measured := baseline.measure_if_due(
                        progress, order.steps, plans, meters.clock, (images, targets, part.rng_keys), due.end
                    ):
                        recorder.control(state, progress, measured)
                    if due.evaluate or due.save:
                        assert_replicas_equal(engine, ema.replicated(), state.step)
                    if due.evaluate:
                        with clock.within(EVALUATION, state.step):
                            state = score(state, progress, kept=due.save)
                        if state.pending_evaluation:  # a signal interrupted it: save; the resume evaluates
                            due = due._replace(save=True, end=True, status="preempted")
                    if due.save:
                        checkpointer.save(state, selection, last=due.end)
                    checkpointer.poll()
                if due.end:
                    return recorder.end(state, due.status)
        return recorder.end(state, "finished")  # resumed a run that had already finished


def _micro_batches(
    batch: Batch, size: int, device: torch.device, end_phase: Callable[[str], None]
) -> Iterator[tuple[Batch, bool]]:
    """This rank's slice of the batch as micro-batches of `size` rows on the device, each with whether it is the last."""
    rows = len(batch.labels)
    for start in range(0, rows, size):
        end_phase("rest")
        fields = [field[start : start + size].to(device, non_blocking=True) for field in batch[:-1]]
        end_phase("host_to_device")
        yield Batch(*fields, broken=batch.broken), start + size >= rows


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


class _Interrupted(Exception):
    """All ranks left an evaluation because a stop was requested."""


def _scored(
    measure: Callable[..., Scores], schedule: Schedule, densities: Sequence[float], engine: Engine, recorder: Recorder, stopping: Stop,
    ema: Ema, network: nn.Module, state: TrainState, at: float, *, kept: bool,
) -> TrainState:  # fmt: skip
    """Evaluate the weights, and their EMA if there is one, under the plan at progress `at` and at `densities`; collective. If a stop is
    requested meanwhile, discards the results and returns a state with `pending_evaluation` set; the resume evaluates again."""

    def agree() -> None:
        if engine.read_delayed(engine.all_reduce_sum(torch.tensor(float(stopping.requested()), device=engine.device))):
            raise _Interrupted

    plans = [(schedule.plan(at), False), *((Plan(density), True) for density in densities)]
    engine.model.eval()
    try:
        results = [Evaluated(False, plan, measure(plan, between=agree), beside) for plan, beside in plans]
        if ema.decay is not None:
            with ema.applied(network):
                results += [Evaluated(True, plan, measure(plan, between=agree), beside) for plan, beside in plans]
    except _Interrupted:
        return replace(state, pending_evaluation={"at": at})
    engine.model.train()
    return recorder.scored(state, results, state.progress, kept)
