"""Checkpoints: whole, elastic, readable without pickle, and never half written.

A checkpoint is a folder `checkpoints/step-00001234/` of safetensors (weights, optimizer, EMA), one npz (example statistics and
selection) and `state.json` (position, chain, configuration, shard fingerprint). Everything is stored by timm's parameter name and
whole, so any world size and any ZeRO stage can go on from it. It is written under a temporary name, fsynced, renamed; the file
`latest` moves last, so a crash at any point leaves the previous one or the new one.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save
from torch import Tensor

from sparsity.types import Selection
from trainer.config import Config, differences
from trainer.configfile import parse
from trainer.values import ConfigError

FORMAT = 1
TEMPORARY = ".writing-"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used; the text says what differs and the way out."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: the next batch is `batch` of `epoch`; `step` optimizer steps lie behind it."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0  # presented with a weight above 0
    seconds: float = 0.0  # of training, over all attempts
    attempt: int = 0
    chain: str = ""  # hash chain of what was seen, see `seen`
    best: float = float("-inf")
    best_step: int = -1
    broken: dict[str, str] = field(default_factory=dict)  # example id -> reason
    skipped: list[int] = field(default_factory=list)  # steps whose gradient was not finite, as the journal counts

    def advanced(self, batches: int) -> TrainState:
        """After one more batch of an epoch that has `batches` of them."""
        end = self.batch + 1 >= batches
        return replace(self, epoch=self.epoch + end, batch=0 if end else self.batch + 1, step=self.step + 1)


@dataclass(frozen=True)
class Saved:
    """What `load` gives back."""

    state: TrainState
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    examples: dict[str, np.ndarray]
    selection: Selection | None
    path: Path


def save_checkpoint(
    folder: Path,
    state: TrainState,
    config: Config,
    fingerprint: str,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    ema: dict[str, Tensor],
    examples: dict[str, np.ndarray],
    selection: Selection | None,
    disk: Disk | None = None,
) -> Path:
    """Write one checkpoint below `folder` and point `latest` at it, then delete what retention no longer wants. Rank 0 only.

    OSError (a full disk) leaves the previous checkpoint in place and no half-written folder behind.
    """
    disk = disk or Disk()
    name = f"step-{state.step:08d}"
    arrays = {f"examples.{k}": v for k, v in examples.items()}
    if selection is not None:
        arrays["selection.keep"] = selection.keep
        if selection.weight is not None:
            arrays["selection.weight"] = selection.weight
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    about = {
        "format": FORMAT,
        "state": asdict(state),
        "config": config.resolved(),
        "fingerprint": fingerprint,
        "selection": None if selection is None else {"num_kept": selection.num_kept, "facts": selection.facts},
    }
    files = {
        "weights.safetensors": save(weights, {"format": "pt"}),
        "optimizer.safetensors": save(optimizer, {"format": "pt"}),
        "ema.safetensors": save(ema, {"format": "pt"}),
        "examples.npz": buffer.getvalue(),
    }
    about["bytes"] = {file: len(content) for file, content in files.items()}
    files["state.json"] = json.dumps(about, indent=1).encode()

    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / (TEMPORARY + name), folder / name
    try:
        if not _same(final, state, config, fingerprint):  # the same step again, after a resume: only `latest` has to move
            _discard(temporary, disk)
            _discard(final, disk)
            disk.mkdir(temporary)
            for file, content in files.items():
                disk.write(temporary / file, content)
            disk.sync_folder(temporary)
            disk.rename(temporary, final)
            disk.sync_folder(folder)
        disk.write(folder / (TEMPORARY + "latest"), name.encode())
        disk.rename(folder / (TEMPORARY + "latest"), folder / "latest")
        disk.sync_folder(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _retain(folder, config.checkpoint.keep, name, state.best_step if config.checkpoint.best else -1, disk)
    return final


def latest(folder: Path) -> Path | None:
    """The checkpoint a resume starts from, or None. Where `latest` is lost or points nowhere, the newest complete folder."""
    pointer = folder / "latest"
    if pointer.is_file() and (found := folder / pointer.read_text().strip()).is_dir() and complete(found):
        return found
    whole = [path for path in sorted(folder.glob("step-*")) if complete(path)]
    return whole[-1] if whole else None


def complete(path: Path) -> bool:
    """Whether every file of a checkpoint is there in its full length."""
    try:
        about = json.loads((path / "state.json").read_text())
        return all((path / file).stat().st_size == size for file, size in about["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _same(path: Path, state: TrainState, config: Config, fingerprint: str) -> bool:
    """Whether a whole checkpoint of this very state lies there: seen the same, by the same settings, on the same shards."""
    if not complete(path):
        return False
    about = json.loads((path / "state.json").read_text())
    there = about["format"], about["state"]["step"], about["state"]["chain"], about["config"], about["fingerprint"]
    return there == (FORMAT, state.step, state.chain, config.resolved(), fingerprint)


def load(path: Path, config: Config, fingerprint: str) -> Saved:
    """Read a checkpoint. Raises CheckpointError where resuming would silently change the run: every difference is named."""
    about = json.loads((path / "state.json").read_text())
    if about["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {about['format']}, this version reads {FORMAT}: use the version that wrote it")
    try:
        theirs = parse(about["config"], str(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: its configuration is not readable by this version:\n{error}") from error
    wrong = [f"  {key}: checkpoint {b!r}, now {a!r}" for key, (a, b) in differences(config, theirs).items()]
    if about["fingerprint"] != fingerprint:
        wrong.append(f"  shards: checkpoint was trained on {about['fingerprint']}, data.train now holds {fingerprint}")
    if wrong:
        raise CheckpointError(
            f"{path} belongs to another run:\n"
            + "\n".join(wrong)
            + "\nGo on with the settings of the checkpoint, or start a new run with another name=..."
        )
    arrays = np.load(path / "examples.npz", allow_pickle=False)
    selection = None
    if about["selection"] is not None:
        weight = arrays.get("selection.weight")
        selection = Selection(arrays["selection.keep"], about["selection"]["num_kept"], weight, about["selection"]["facts"])
    return Saved(
        state=TrainState(**about["state"]),
        weights=load_file(path / "weights.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        ema=load_file(path / "ema.safetensors"),
        examples={k.removeprefix("examples."): arrays[k] for k in arrays.files if k.startswith("examples.")},
        selection=selection,
        path=path,
    )


class Disk:
    """The four things a save does to a disk, in one place so that a test can stop time after each of them."""

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True)

    def write(self, path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def sync_folder(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        shutil.rmtree(path)


def _retain(folder: Path, newest: int, current: str, best_step: int, disk: Disk) -> None:
    names = sorted(path.name for path in folder.glob("step-*"))
    wanted = {*names[-newest:], current, f"step-{best_step:08d}"}
    for name in names:
        if name not in wanted:
            _discard(folder / name, disk)


def _discard(path: Path, disk: Disk) -> None:
    if path.exists():
        # renamed first: a folder that is being deleted must not look like a checkpoint
        doomed = path if path.name.startswith(TEMPORARY) else path.with_name(TEMPORARY + "old-" + path.name)
        if doomed != path:
            disk.rename(path, doomed)
        disk.remove(doomed)
