"""From a configuration to the parts that the training loop uses, in the order in which they can be built.

Everything that needs no other rank comes first: settings, data, network, loader processes (they are started before the engine has
threads). Then the engine, the checkpoint to resume from, and the parts that hold state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from sparsity.attention_kernel import TORCHS_CHOICE
from sparsity.network import SparseNetwork
from sparsity.types import DENSE, Examples, Plan, Selection
from trainer.checkpoint import save_load
from trainer.checkpoint.directory import Newest
from trainer.checkpoint.state import Saved, TrainState
from trainer.config.run_config import Config
from trainer.data.augment.prepare import Prepare, build_prepare
from trainer.data.loader.build import clean_images, training_stream, validation_set
from trainer.data.loader.dataset import check_classes, open_indexes
from trainer.data.loader.stream import Stream
from trainer.data.loader.validation import CleanImages, Validation
from trainer.data.order import micro_batches
from trainer.data.shards.index import Index
from trainer.engine.engine import Engine
from trainer.engine.environment import (
    is_first_of_node,
    rank,
    ranks_of_node,
    use_device_of_rank,
    use_expandable_segments,
    world_size,
)
from trainer.model import importance
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
from trainer.model.evaluate import evaluate
from trainer.model.optimizer import build_optimizer
from trainer.model.schedule import Schedule
from trainer.model.teacher import Teacher, build_teacher
from trainer.provenance.hash_chain import HashChain
from trainer.run import known_checkpoint
from trainer.run.cadence import Cadence
from trainer.run.checkpointer import Checkpointer
from trainer.run.dense_baseline import DenseBaseline
from trainer.run.example_probe import ExampleProbe
from trainer.run.garbage import only_new_objects_collected
from trainer.run.ineffective import refuse_ineffective, warnings_of
from trainer.run.nonfinite_steps import Outcomes
from trainer.run.process_limits import check_limits, check_shared_memory, few_cores
from trainer.run.recorder import Recorder
from trainer.run.row_results import RowResults
from trainer.run.running_statistics import RunningStatistics
from trainer.run.scoring import Scoring
from trainer.run.shutdown import Stop, install_handlers
from trainer.run.weight_pruning import WeightPruning
from trainer.telemetry.meters import Meters


@dataclass(frozen=True)
class Run:
    """What the loop uses. `state` and `selection` are those to begin with: of the checkpoint, or of a new run."""

    index: Index
    stream: Stream
    engine: Engine
    model: SparseNetwork  # without the engine's wrapper
    schedule: Schedule
    cadence: Cadence
    stopping: Stop
    prepare: Prepare
    teacher: Teacher
    results: RowResults
    outputs: frozenset[str]  # of the network, beside its logits
    examples: Examples
    probe: ExampleProbe
    pruning: WeightPruning
    ema: Ema
    statistics: RunningStatistics  # of batch norms
    chain: HashChain
    outcomes: Outcomes
    meters: Meters
    recorder: Recorder
    baseline: DenseBaseline
    checkpointer: Checkpointer
    score: Scoring
    cost: partial[dict[str, object]]  # of a plan, see `cost_of`
    state: TrainState
    selection: Selection | None


@contextmanager
def assembled(config: Config, resume: bool) -> Iterator[Run]:
    """All parts of one attempt of a run, with its directory made and its journal begun; `resume`: from the newest checkpoint.

    A failure inside the context is recorded in the journal; the engine is released at the end.
    Raises ConfigError, DataError, EngineError or CheckpointError; the message names the key, the value and the remedy.
    """
    refuse_ineffective(config, resume)
    torch.set_float32_matmul_precision("highest" if config.engine.precision == "float32" else "high")
    check_limits(config.data.workers, world_size())
    index, validation_index = open_indexes(config.data, verify=is_first_of_node())
    check_classes(index, validation_index)
    model, examples, objective = build_model(config), build_examples(config, index), build_objective(config)
    schedule, distillation, weights = build_schedule(config), build_distillation(config), build_pruning(config, model)
    teacher = build_teacher(config, model, distillation.teacher_outputs)
    stopping = install_handlers()
    stream, validation, clean = _loaders(config, index, validation_index)
    stream.order(0, None)  # raises where no epoch has a full batch, before the directory is made
    engine = Engine(config.engine, micro_batches(config.data.batch, config.data.micro_batch, world_size()), config.optim.clip)
    engine.assert_same_on_all_ranks(teacher.hash, "the teacher's weights")
    found, saved = _to_resume(config, index, teacher, model, engine) if resume else (save_load.NOTHING, None)
    recorder = Recorder(config, engine, resume)
    with only_new_objects_collected(), engine.released_afterwards(), recorder.recording_failures():
        if saved:
            model.network.load_state_dict(saved.weights)  # before `prepare`: ZeRO's master weights are copies of these
        engine.prepare(model, build_optimizer(model, config.optim))
        teacher.prepare(engine)
        ema = Ema(model.network, config.optim.ema)
        if saved:
            engine.state.load(saved.weights, saved.optimizer)
            ema.load_state_dict(saved.ema)
            examples.load_state_dict(saved.examples)
        pruning = WeightPruning(weights, engine, model, ema, recorder, saved.pruning if saved else {})
        state = replace(saved.state if saved else TrainState(), attempt=recorder.attempt)
        probe = ExampleProbe(config, index, engine, objective, examples, recorder, stopping, clean)
        outputs = frozenset({"cls_attention"} if examples.wants_spread and not probe.on else ()) | distillation.outputs
        attention = _choose_kernels(config, engine, model, teacher, schedule, saved)
        # after `build_optimizer`: frozen batch norms
        warnings = warnings_of(config, model.network, index, validation_index, engine.world)
        warnings += [*attention.pop("warnings", []), *few_cores(ranks_of_node())]
        scored = {importance.KEY: importance.name_of(config, model)}
        facts = cost_of(model, DENSE) | teacher.facts() | {"warnings": warnings} | scored | attention
        recorder.start(state, {"train": index, "validation": validation_index}, model, facts)
        recorder.report_found(found)
        save = partial(
            save_load.save_checkpoint, recorder.checkpoints, kernels=model.kernels, kernels_on=engine.device_name(),
            config=config, fingerprint=index.fingerprint, teacher=teacher.hash, **scored,  # a resume must match these
        )  # fmt: skip
        measure = partial(
            evaluate, engine.forward, validation, classes=config.model.classes, augment=config.augment, device=engine.device,
            add_up=engine.all_reduce_sum,
        )  # fmt: skip
        compiled, meters = config.engine.compile, Meters(engine, distillation.parts)
        observing = None if probe.on else examples
        yield Run(
            index=index,
            stream=stream,
            engine=engine,
            model=model,
            schedule=schedule,
            cadence=Cadence(
                config.epochs, config.stop_at, config.log_every, evaluate=config.evaluate.every, save=config.checkpoint.every
            ),
            stopping=stopping,
            prepare=build_prepare(config.augment, config.model.classes, compiled=compiled),
            teacher=teacher,
            results=RowResults(
                objective, distillation, observing, meters, engine.scaled, compiled=compiled, device=engine.device
            ),
            outputs=outputs,
            examples=examples,
            probe=probe,
            pruning=pruning,
            ema=ema,
            statistics=RunningStatistics(model.network, engine, alike=config.model.sync_batchnorm),
            chain=HashChain(state.chain),
            outcomes=Outcomes(engine.device),
            meters=meters,
            recorder=recorder,
            baseline=DenseBaseline(config.control, schedule, engine, objective, outputs, teacher),
            checkpointer=Checkpointer(
                save, config.checkpoint.asynchronous, engine, recorder, stopping, ema, examples, pruning.state_dict
            ),
            score=Scoring(measure, schedule, config.evaluate.densities, engine, recorder, stopping, ema, model.network),
            cost=partial(cost_of, model),
            state=state,
            selection=saved.selection if saved else None,
        )
    engine.meet_at_end()


def _choose_kernels(
    config: Config, engine: Engine, model: SparseNetwork, teacher: Teacher, schedule: Schedule, saved: Saved | None
) -> dict[str, Any]:
    """Collective: the attention kernels of the network and of its teacher, for every plan of the run. Returns the journal's fields."""
    plans = {DENSE, schedule.last(), *(one.plan for one in schedule.stretches()), *map(Plan, config.evaluate.densities)}
    shapes = (shape for plan in plans for shape in model.attention_shapes(plan))
    before = (saved.kernels, saved.kernels_on) if saved else (TORCHS_CHOICE, "")
    model.kernels, facts = engine.choose_attention(shapes, *before)
    teacher.use_kernels(model.kernels)
    return facts


def _loaders(config: Config, index: Index, validation: Index) -> tuple[Stream, Validation, CleanImages | None]:
    """Training batches, validation batches, and images without augmentation where a probe wants them; their workers are started."""
    loaders = (
        training_stream(index, config, rank(), world_size()),
        validation_set(validation, config, rank(), world_size()),
        clean_images(index, config, rank(), world_size(), probe.probe_share) if (probe := config.examples.probe) else None,
    )
    slots = loaders[0].batch_split.slots
    evaluated = max(loader.most_at_once for loader in loaders[1:] if loader is not None)
    check_shared_memory(config.data.workers, ranks_of_node(), slots, config.model.image_size, loaders[0].row_bytes, evaluated)
    use_expandable_segments(config.engine.cuda_graphs)
    use_device_of_rank()
    for loader in loaders:
        if loader is not None:
            loader.fork()
    return loaders


def _to_resume(
    config: Config, index: Index, teacher: Teacher, model: SparseNetwork, engine: Engine
) -> tuple[Newest, Saved | None]:
    """The newest checkpoint, the same on all ranks, and its content; None if there is none yet."""
    found = save_load.newest(config.directory() / "checkpoints")
    saved = save_load.load(found.path, config, index.fingerprint, teacher.hash, model) if found.path else None
    if found.path:
        known_checkpoint.note(found.path)
    else:
        known_checkpoint.refuse_to_begin_anew(config.directory() / "checkpoints")
    engine.assert_same_on_all_ranks(
        f"step {saved.state.step}, {saved.state.chain}" if saved else "none", "the checkpoint to resume from"
    )
    return found, saved
