"""Checkpoints: a crash at any point leaves one that can be used; a resume that would change the run is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsity.types import Selection
from tests.conftest import rewritten
from trainer.checkpoint import CheckpointError, Disk, TrainState, complete, latest, load, save_checkpoint
from trainer.config import Config
from trainer.configfile import parse

PLAIN = {"name": "x", "model": {"name": "m"}, "data": {"train": "a", "validation": "b"}, "checkpoint": {"keep": 2}}


class Crash(Exception):
    """The machine is gone."""


class Doomed(Disk):
    """A disk whose machine goes down at the n-th thing done to it, in the middle of a write too."""

    def __init__(self, until: int, torn: bool):
        self.left, self.torn = until, torn

    def _live(self, half: Callable[[], Any] = lambda: None) -> None:
        if self.left == 0:
            if self.torn:
                half()
            raise Crash
        self.left -= 1

    def mkdir(self, path: Path) -> None:
        self._live()
        super().mkdir(path)

    def write(self, path: Path, content: bytes) -> None:
        self._live(lambda: path.write_bytes(content[: len(content) // 2]))
        super().write(path, content)

    def rename(self, old: Path, new: Path) -> None:
        self._live()
        super().rename(old, new)

    def sync_folder(self, path: Path) -> None:
        self._live()
        super().sync_folder(path)

    def remove(self, path: Path) -> None:
        self._live(lambda: next(path.iterdir()).unlink())
        super().remove(path)


@pytest.fixture
def config() -> Config:
    return parse(PLAIN)


def save(folder: Path, config: Config, step: int, disk: Disk | None = None, **more: Any) -> Path:
    state = TrainState(epoch=1, batch=2, step=step, chain="ab", **more)
    return save_checkpoint(
        folder,
        state,
        config,
        "shards",
        weights={"head.weight": torch.full((2, 3), float(step))},
        optimizer={"head.weight|exp_avg": torch.full((2, 3), step / 7), "|step": torch.tensor(float(step))},
        ema={},
        examples={"events": np.arange(5, dtype=np.int16) * step},
        selection=Selection(np.array([0b10101], dtype=np.uint8), 3, np.ones(5, dtype=np.float32), {"hash": "h"}),
        disk=disk,
    )


def test_everything_comes_back(tmp_path: Path, config: Config) -> None:
    saved = load(save(tmp_path, config, 4, best=0.5, broken={"7": "no image"}), config, "shards")
    assert saved.state == TrainState(epoch=1, batch=2, step=4, chain="ab", best=0.5, broken={"7": "no image"})
    assert torch.equal(saved.weights["head.weight"], torch.full((2, 3), 4.0))
    assert saved.optimizer.keys() == {"head.weight|exp_avg", "|step"}
    assert saved.selection is not None and saved.selection.weight is not None
    assert saved.selection.keep.tolist() == [0b10101] and saved.selection.num_kept == 3
    assert saved.examples["events"].tolist() == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_at_any_point_leaves_the_old_or_the_new_one(tmp_path: Path, config: Config, torn: bool) -> None:
    points = 0
    for point in range(200):
        folder = tmp_path / str(point)
        save(folder, config, 1), save(folder, config, 2)
        ended = True
        try:
            save(folder, config, 3, Doomed(point, torn))
        except Crash:
            ended = False
        found = latest(folder)
        assert found is not None and complete(found), f"nothing usable after a crash at point {point}"
        saved = load(found, config, "shards")
        assert saved.state.step in (2, 3) and torch.equal(
            saved.weights["head.weight"], torch.full((2, 3), float(saved.state.step))
        )
        assert saved.state.step == 3 or not ended
        # the next attempt saves over whatever lies there
        assert load(save(folder, config, 4), config, "shards").state.step == 4 and latest(folder) == folder / "step-00000004"
        if ended:
            break
        points += 1
    assert ended and points >= 12, points


def test_the_newest_and_the_best_are_kept(tmp_path: Path, config: Config) -> None:
    for step in range(1, 7):
        save(tmp_path, config, step, best=0.9, best_step=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000005", "step-00000006"]
    assert not list(tmp_path.glob(".writing-*"))


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, config: Config) -> None:
    class Full(Disk):
        def write(self, path: Path, content: bytes) -> None:
            path.write_bytes(content[:5])
            raise OSError(28, "No space left on device")

    save(tmp_path, config, 1)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, config, 2, Full())
    assert latest(tmp_path) == tmp_path / "step-00000001" and not list(tmp_path.glob(".writing-step*"))


def test_a_pointer_that_is_lost_or_points_nowhere_finds_the_newest_whole_one(tmp_path: Path, config: Config) -> None:
    assert latest(tmp_path) is None
    save(tmp_path, config, 1)
    broken = save(tmp_path, config, 2)
    (broken / "weights.safetensors").write_bytes(b"short")
    assert latest(tmp_path) == tmp_path / "step-00000001"
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == tmp_path / "step-00000001"


def test_another_configuration_or_other_shards_are_refused_by_name(tmp_path: Path, config: Config) -> None:
    path = save(tmp_path, config, 1)
    other = config.model_copy(update={"seed": 5, "optim": config.optim.model_copy(update={"lr": 0.25})})
    with pytest.raises(CheckpointError, match=r"optim\.lr: checkpoint 0\.001, now 0\.25\n  seed: checkpoint 0, now 5"):
        load(path, other, "shards")
    with pytest.raises(CheckpointError, match=r"shards: checkpoint was trained on shards, data\.train now holds else"):
        load(path, config, "else")
    free = config.model_copy(update={"data": config.data.model_copy(update={"workers": 9})})
    assert load(path, free, "shards").state.step == 1
    rewritten(path / "state.json", lambda about: about.update(format=99))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        load(path, config, "shards")


def test_the_position_moves_through_epochs_of_any_length() -> None:
    state = TrainState()
    for _ in range(3):
        state = state.advanced(3)
    assert (state.epoch, state.batch, state.step) == (1, 0, 3)
    assert replace(state, batch=4).advanced(9).batch == 5
    assert json.dumps(state.broken) == "{}"
