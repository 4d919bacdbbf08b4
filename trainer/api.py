"""What a notebook needs; everything here is `from trainer import ...`.

In: paths of configurations, runs and weights.
Out: results as plain objects, pandas data frames and timm models.
Never: prints tables or ends the process (the command line does).
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from trainer.config.run_config import Config
    from trainer.model.exported import AnyDensity
    from trainer.run.recorder import RunResult


def load_config(path: str | Path, *overrides: str, **settings: Any) -> Config:
    """The configuration of a YAML file, or of a run directory.

    overrides: `"optim.lr=5e-4"`, as on the command line. settings: top-level keys, `epochs=4, name="first"`; None is null.
    Raises ConfigError.
    """
    from trainer.config.load import load

    path = Path(path)
    return load(path / "config.yaml" if path.is_dir() else path, _words(overrides, settings))


def _words(overrides: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Overrides as on the command line."""
    return [*overrides, *(f"{key}={json.dumps(value, default=str)}" for key, value in settings.items())]  # JSON is YAML


def run_training(config: Config, resume: bool = False) -> RunResult:
    """Train in this process, the same as `trilevel train`; several processes are started by a launcher.

    Returns the status ("finished", "stopped" or "preempted"), the last top-1 in [0, 1] and the run directory. While it runs, Ctrl-C
    saves and ends the run, a second one interrupts; the signal handlers of the caller are put back afterwards.
    Raises ConfigError, DataError, EngineError or CheckpointError.
    """
    from trainer.engine.environment import reset_accelerate
    from trainer.run.shutdown import SIGNALS
    from trainer.train import train

    reset_accelerate()  # another Engine may have lived in this process
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    try:
        return train(config, resume)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        reset_accelerate()


def evaluate(
    model: str | Path, config: Config | None = None, densities: Sequence[float] | None = None, *overrides: str, **settings: Any
) -> pandas.DataFrame:
    """Top-1, top-5 and multiply-adds of a run directory, a weights file or `timm:NAME` on the validation shards of `config`.

    config: needed for a file and for timm, else the run's own with `overrides` and `settings`, as in `load_config`:
    `evaluate(run, evaluate={"batch": 64})`. densities: keep ratios of tokens in (0, 1]; None: the final plan of the configuration.
    One row per density, with the columns of `trilevel eval --json`. Raises ConfigError.
    """
    import pandas

    from trainer.analysis.evaluation.densities import score

    found = score(str(model), config, list(densities) if densities else None, _words(overrides, settings))
    return pandas.DataFrame(found.facts()["rows"])


def read_run(run: str | Path) -> dict[str, pandas.DataFrame]:
    """The journal of a run as one data frame per kind of line: `read_run(run)["step"]`, `["eval"]`, `["epoch"]`, ...

    Only lines whose weights survived: steps that a resume repeated appear once. Shares are in [0, 1], `seconds` of training since
    the line before, `time` in seconds since 1970. Raises JournalError where there is no journal.
    """
    import pandas

    from trainer.journal.reader import lineage

    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for line in lineage(run):
        kinds.setdefault(line["kind"], []).append(line)
    return {kind: pandas.DataFrame(lines).drop(columns="kind") for kind, lines in kinds.items()}


def compare(*runs: str | Path, base: str | None = None) -> pandas.DataFrame:
    """The numbers of `trilevel compare`, one row per run; runs that differ only in their seed are one row. Index: the name.

    base: the name of the run or group that the others are compared with; default: the dense one. Shares and top-1 in [0, 1], seconds of
    training; `NAME_sd`, and `NAME_low` and `NAME_high` of the 95 % interval where several seeds allow one; `whole_time`, `equal_time`, ...:
    base / run, above 1 is cheaper. Raises NothingToCompare.
    """
    import pandas

    from trainer.analysis.comparison.figures import facts
    from trainer.analysis.comparison.groups import compare as compared

    return pandas.DataFrame(facts(compared(list(runs), base=base))).set_index("run")


def load_model(path: str | Path) -> AnyDensity:
    """The network of a file of `trilevel export`, at any density: `model(images, density=.5)`, or `adaptive=True` after
    `trilevel calibrate`; images normalised, (B, 3, S, S). Raises ConfigError.
    """
    from trainer.model.exported import load_exported

    return load_exported(path)


def load_weights(path: str | Path) -> nn.Module:
    """The plain timm model of a run directory or of a file of `trilevel export`, with its weights, in evaluation mode: dense, nothing of
    ours around it. Files of `export --compact` whose layers differ in size, and those of `--blocks`, are refused: see `load_model`.
    Raises ConfigError.
    """
    from trainer.config.errors import ConfigError
    from trainer.model import weights
    from trainer.model.exported import load_plain

    run = Path(path)
    if run.is_file():
        return load_plain(run)
    if not (run / "weights.safetensors").is_file():
        raise ConfigError(
            f"{run}: no weights.safetensors in it; give a run directory after its first checkpoint or an exported file"
        )
    config = load_config(run, "model.init=random")
    model = weights.create(config.model, config.seed)
    model.load_state_dict(weights.load_weights(run / "weights.safetensors"))
    return model.eval()
