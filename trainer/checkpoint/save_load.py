"""Checkpoints: the full state of a run, for any world size, readable without pickle.

A checkpoint is a folder `checkpoints/step-00001234/` of safetensors (weights, optimizer, EMA, masks), one npz (example statistics and
selection) and `state.json` (position, chain, configuration, shard fingerprint, hashes of the files). Tensors are stored unsharded,
by timm's parameter name, so any world size and any ZeRO stage can resume from it. Writing: see `directory`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsity.attention_kernel import BACKENDS, TORCHS_CHOICE, Kernels
from sparsity.network import SparseNetwork
from sparsity.types import Selection
from trainer.checkpoint import directory
from trainer.checkpoint.directory import Newest
from trainer.checkpoint.retention import delete_old, refuse_incomplete
from trainer.checkpoint.state import Saved, TrainState
from trainer.config.errors import ConfigError, TrilevelError
from trainer.config.load import parse_recorded
from trainer.config.recorded import without_foreign
from trainer.config.run_config import Config, differences
from trainer.model import importance as scored
from trainer.storage import safetensors_stream
from trainer.storage.disk import Disk
from trainer.storage.npz import read_npz

NOTHING = Newest(None, [])
PRUNING = "pruning.safetensors"  # level 4
_STORED_AS = {"pending_evaluation": "owed"}  # fields of TrainState that have another key in `state.json`


class CheckpointError(TrilevelError, RuntimeError):
    """A checkpoint that can't be used; the message names the difference and the remedy."""


def save_checkpoint(
    folder: Path,
    state: TrainState,
    config: Config,
    fingerprint: str,
    teacher: str = "",
    importance: str | None = None,
    kernels: Kernels = TORCHS_CHOICE,
    kernels_on: str = "",
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    ema: dict[str, Tensor],
    examples: dict[str, np.ndarray],
    selection: Selection | None,
    pruning: Mapping[str, Tensor] = MappingProxyType({}),
    disk: Disk | None = None,
) -> Path:
    """Write one checkpoint below `folder` and point `latest` at it, then delete those that retention does not keep. Rank 0 only.

    state: position in the run.
    config, fingerprint, teacher: of the run, its training shards and its teacher (hash of the weights); a resume must match them.
    importance: name of the score of tokens, see `model.importance.name_of`.
    kernels: of attention, timed on the device `kernels_on`; a resume on another one of that name uses them again.
    weights, optimizer, ema: unsharded tensors on the CPU, by timm's parameter name.
    examples, selection: statistics of level 1, and the examples of the current epoch.
    pruning: state of level 4, on the CPU; without any there is no file.
    disk: where to write; default: the file system.
    OSError (a full disk) leaves the previous checkpoint in place and no partial folder.
    """
    disk = disk or Disk()
    arrays = {f"examples.{k}": v for k, v in examples.items()}
    if selection is not None:
        arrays["selection.keep"] = selection.keep
        if selection.weight is not None:
            arrays["selection.weight"] = selection.weight
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    files: dict[str, Iterable[Any]] = {
        "weights.safetensors": safetensors_stream.pieces(weights, {}),
        "optimizer.safetensors": safetensors_stream.pieces(optimizer, {}),
        "ema.safetensors": safetensors_stream.pieces(ema, {}),
        "examples.npz": [buffer.getbuffer()],
    }
    if pruning:
        files[PRUNING] = safetensors_stream.pieces(pruning, {})
    about = {
        "state": {_STORED_AS.get(name, name): value for name, value in asdict(state).items()},
        "config": config.resolved(),
        "fingerprint": fingerprint,
        "teacher": teacher,
        scored.KEY: importance,
        "attention": [[*kind, name] for kind, name in sorted(kernels.items())],
        "attention_on": kernels_on if kernels else "",
        "selection": None if selection is None else {"num_kept": selection.num_kept, "facts": selection.facts},
    }

    def same(there: dict[str, Any]) -> bool:
        """After the same images, by the same settings, on the same shards: this very state, saved again after a resume."""
        if there["format"] > directory.FORMAT:
            return False
        refuse_incomplete(f"step {state.step}", there)
        known = {
            "config": without_foreign(there["config"]),
            "fingerprint": there["fingerprint"],
            "teacher": there.get("teacher", ""),
        }
        return known == {key: about[key] for key in known} and all(
            there["state"].get(key) == about["state"][key] for key in ("step", "chain", "owed", "best_step", "skipped")
        )

    folder.mkdir(parents=True, exist_ok=True)
    path = directory.write(folder, state.step, files, about, same, disk)
    with suppress(OSError):  # the new checkpoint is complete; old ones are deleted at the next save
        delete_old(folder, config.checkpoint, path.name, state, disk)
    return path


def newest(folder: Path) -> Newest:
    """The checkpoint to resume from, with the hash of every file verified. Raises CheckpointError if all checkpoints are damaged: a
    start from scratch must then be explicit."""
    try:
        return directory.newest(folder, check=refuse_incomplete)
    except directory.Damaged as error:
        raise CheckpointError(str(error)) from error


def latest(folder: Path) -> Path | None:
    return newest(folder).path


def _state_of(stored: dict[str, Any]) -> TrainState:
    fields = {key: name for name, key in _STORED_AS.items()}
    return TrainState(**{fields.get(key, key): value for key, value in stored.items()})


def compared(
    path: Path, config: Config, fingerprint: str, teacher: str = "", network: SparseNetwork | None = None
) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`. Raises CheckpointError, with every difference, if resuming from it would change the run.
    fingerprint, teacher: of the training shards and of the teacher's weights, as they are now. network: of the run."""
    try:
        about = directory.verify(path, content=False)
        refuse_incomplete(path.name, about)
    except directory.Damaged as error:
        raise CheckpointError(f"{path.parent}: {error}") from error
    if about["format"] > directory.FORMAT:
        raise CheckpointError(
            f"{path}: format {about['format']}, this version reads up to {directory.FORMAT}: use the version that wrote it"
        )
    try:
        theirs = parse_recorded(about["config"], str(path))
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: this version can't read its configuration; use the version that wrote it:\n{error}"
        ) from error
    different = differences(config, theirs)
    if network is not None:
        different = scored.compared(different, config, theirs, about.get(scored.KEY), network)
    wrong = [f"  {key}: checkpoint {b!r}, now {a!r}" for key, (a, b) in different.items()]
    if about["fingerprint"] != fingerprint:
        wrong.append(f"  shards: checkpoint was trained on {about['fingerprint']}, data.train now holds {fingerprint}")
    if (before := about.get("teacher", "")) != teacher:
        was, now = (f"weights of hash {one}" if one else "no teacher" for one in (before, teacher))
        wrong.append(f"  teacher: checkpoint was trained with {was}, teacher.from={config.teacher.source} is {now}")
    if wrong:
        raise CheckpointError(
            f"{path} belongs to another run:\n"
            + "\n".join(wrong)
            + "\nContinue with the settings of the checkpoint, or start a new run with name=NEW_NAME"
        )
    return about


def load(path: Path, config: Config, fingerprint: str, teacher: str = "", network: SparseNetwork | None = None) -> Saved:
    """Read a checkpoint that has passed `compared`. Raises CheckpointError."""
    about = compared(path, config, fingerprint, teacher, network)
    try:
        saved = _read(path, about)
        unknown = sorted({*saved.kernels.values()} - {*BACKENDS})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: can't be read ({type(error).__name__}: {error}), though its hashes hold; resume from another checkpoint: write its "
            f"name into {path.parent / directory.LATEST}"
        ) from error
    if unknown and config.engine.attention == "auto":  # else they are not used
        raise CheckpointError(
            f"{path / directory.ABOUT}: attention: unknown kernel {unknown[0]!r}; valid values: {', '.join(BACKENDS)}. Use the version "
            "that wrote the checkpoint, or resume with engine.attention=torch, which leaves the choice to torch"
        )
    return saved


def _read(path: Path, about: dict[str, Any]) -> Saved:
    arrays = arrays_of(path)
    selection = None
    if about["selection"] is not None:
        weight = arrays.get("selection.weight")
        selection = Selection(arrays["selection.keep"], about["selection"]["num_kept"], weight, about["selection"]["facts"])
    return Saved(
        state=_state_of(about["state"]),
        weights=load_file(path / "weights.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        ema=load_file(path / "ema.safetensors"),
        examples=statistics_of(arrays),
        selection=selection,
        path=path,
        pruning=pruning_of(path),
        kernels={(tokens, masked): name for tokens, masked, name in about.get("attention", [])},
        kernels_on=about.get("attention_on", ""),
    )


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint's examples.npz. It is not compressed, so together they have at most the bytes of the file. Raises
    OSError, ValueError."""
    file = path / "examples.npz"
    return read_npz(file, file.stat().st_size)


def statistics_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of level 1, by the names that it gave them."""
    return {name.removeprefix("examples."): array for name, array in arrays.items() if name.startswith("examples.")}


def pruning_of(path: Path) -> dict[str, Tensor]:
    """The state of level 4 in a checkpoint; {} in a run without it."""
    return load_file(path / PRUNING) if (path / PRUNING).is_file() else {}
