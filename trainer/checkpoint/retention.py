"""Which checkpoints stay on disk: the newest, the best, and those at multiples of `checkpoint.keep_every`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainer.checkpoint import directory
from trainer.checkpoint.state import TrainState
from trainer.config.schema_run import CheckpointConfig
from trainer.storage.disk import Disk


class OnDisk(NamedTuple):
    """A usable checkpoint: its folder's name and its position."""

    name: str
    step: int
    progress: float  # in epochs


def delete_old(folder: Path, settings: CheckpointConfig, current: str, state: TrainState, disk: Disk) -> None:
    """Delete the checkpoints of `folder` that are not to be kept once `current`, at `state`, is written. Raises OSError."""
    there, newer = _found(folder, disk)
    directory.prune(folder, retained(there, settings, current, state.best_step) | newer, disk)


def retained(there: list[OnDisk], settings: CheckpointConfig, current: str, best_step: int) -> set[str]:
    """The names to keep, of checkpoints by age: the newest `keep`, the best, the first at or after each multiple of `keep_every`,
    and the current one. Of several of one step the last counts."""
    last = {one.step: one for one in there if one.step <= directory.step_of(current)}  # later steps are of an abandoned attempt
    wanted = {one.name for one in list(last.values())[-settings.keep :]} | {current}
    if settings.best and best_step in last:
        wanted.add(last[best_step].name)
    if (every := settings.keep_every).count > 0:
        reached = 0
        for one in last.values():
            multiple = every.multiples(one.step if every.unit == "step" else one.progress)
            if multiple > reached:
                wanted.add(one.name)
            reached = max(multiple, reached)
    return wanted


def refuse_incomplete(name: str, about: dict[str, Any]) -> None:
    """Raises Damaged for a `state.json` of this format without the fields that a resume needs."""
    if about["format"] > directory.FORMAT:
        return
    state = about.get("state")
    fields: list[tuple[str, Any, type | tuple[type, ...]]] = [
        ("state", state, dict), ("config", about.get("config"), dict), ("fingerprint", about.get("fingerprint"), str),
    ]  # fmt: skip
    if isinstance(state, dict):
        fields += [("state.step", state.get("step"), int), ("state.epoch", state.get("epoch"), int)]
        fields += [("state.progress", state.get("progress", 0), (int, float))]
    for field, value, kind in fields:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise directory.Damaged(f"{name}: {directory.ABOUT} has no usable {field}")


def _found(folder: Path, disk: Disk) -> tuple[list[OnDisk], set[str]]:
    """The usable checkpoints, by age, and the names of those that a newer version wrote, which are not ours to delete."""
    usable, newer = [], set[str]()
    for name in directory.by_age(disk.names(folder)):
        with suppress(directory.Damaged):
            about = directory.verify(folder / name, disk, content=False)
            if about["format"] > directory.FORMAT:
                newer.add(name)
                continue
            refuse_incomplete(name, about)
            usable.append(OnDisk(name, about["state"]["step"], about["state"].get("progress") or about["state"]["epoch"]))
    return usable, newer
