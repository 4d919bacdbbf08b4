"""How to train: one package per concern. Start reading at `trainer/train.py`.

    cli/          the command line: arguments, one handler per command, printing
    config/       the YAML: schema, values with units, loading, checks across sections
    storage/      files that survive a crash (fsync and rename), private files, streamed safetensors, standard streams, safe texts
    journal/      the run's own record: one JSON line per event; writer and reader
    data/         order of the examples, remote files, shards, augmentation, loading
    engine/       the only importer of accelerate and DeepSpeed: step, collectives, full (unsharded) state
    model/        network, weights, loss, optimizer, EMA, schedule, one evaluation pass
    telemetry/    meters, phases of a step, hardware load, efficiency (MFU, goodput), profiler
    checkpoint/   what is saved, crash-safe directories, retention, export
    tracking/     the journal to MLflow, in a process of its own; the only importer of mlflow
    provenance/   which examples a run used: hash chain, kept lists, replay, audit
    analysis/     results of runs: history, report, compare, study, densities, calibrate, pictures
    run/          one attempt: run directory, recorder, console, checkpointer, dense baseline, weight pruning, signals
    preflight/    before the GPU-hours: init, check, estimate, fault simulation, doctor, hosts, parity with timm, shard verification
    bench/        measurements: input, remote, step, inference, engine, checkpoint, journal, GPU check
    train.py      the training loop
    api.py        what a notebook imports: `from trainer import load_config, run_training, evaluate, read_run, ...`

Lower packages never import higher ones; `pyproject.toml` holds the layers as contracts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api import compare, evaluate, load_config, load_model, load_weights, read_run, run_training

__all__ = ["compare", "evaluate", "load_config", "load_model", "load_weights", "read_run", "run_training"]


def __getattr__(name: str) -> Any:
    """The names of `trainer.api`, imported when they are first used: a child process that only needs a small module starts quickly."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer import api

    return getattr(api, name)
