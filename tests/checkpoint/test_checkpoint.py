"""Checkpoints: what is in them comes back, damage is noticed, old ones go; a resume that would change the run is refused by name.
What a crash leaves: test_crash.py."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparsity.types import Selection
from tests.conftest import ROOT, rewritten
from tests.support.recorded_configs import recorded
from trainer.checkpoint import directory
from trainer.checkpoint.directory import by_age
from trainer.checkpoint.retention import OnDisk, retained
from trainer.checkpoint.save_load import CheckpointError, latest, load, newest, save_checkpoint
from trainer.checkpoint.state import TrainState
from trainer.config.errors import ConfigError
from trainer.config.load import parse
from trainer.config.run_config import FREE_TO_CHANGE, Config
from trainer.config.schema_run import CheckpointConfig
from trainer.run.directory import create_run_directory
from trainer.storage import safetensors_stream
from trainer.storage.disk import Disk

KERNELS = {(197, False): "cudnn", (139, True): "efficient"}
PLAIN = {"name": "x", "model": {"name": "m"}, "data": {"train": "a", "validation": "b"}, "checkpoint": {"keep": 2}}


@pytest.fixture
def config() -> Config:
    return parse(PLAIN)


def save(folder: Path, config: Config, step: int, disk: Disk | None = None, **more: Any) -> Path:
    state = replace(TrainState(epoch=1, batch=2, step=step, chain="ab"), **more)
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
        kernels=KERNELS,
        kernels_on="NVIDIA H200",
    )


def test_everything_comes_back(tmp_path: Path, config: Config) -> None:
    counted: dict[str, Any] = {"best": 0.5, "best_step": 3, "broken": {"7": "no image"}, "skipped": [3, 5], "images": 96}
    counted |= {"seconds": 1.5, "attempt": 2, "progress": 1.25, "pending_evaluation": {"at": 1.0}}
    saved = load(save(tmp_path, config, 4, **counted), config, "shards")
    assert saved.state == TrainState(epoch=1, batch=2, step=4, chain="ab", **counted)
    assert set(counted) | {"epoch", "batch", "step", "chain"} == set(TrainState.__dataclass_fields__), "every field"
    assert torch.equal(saved.weights["head.weight"], torch.full((2, 3), 4.0))
    assert saved.optimizer.keys() == {"head.weight|exp_avg", "|step"}
    assert saved.selection is not None and saved.selection.weight is not None
    assert saved.selection.keep.tolist() == [0b10101] and saved.selection.num_kept == 3
    assert saved.examples["events"].tolist() == [0, 4, 8, 12, 16] and saved.kernels == KERNELS
    assert saved.kernels_on == "NVIDIA H200"


def test_kernels_of_attention_of_another_version(tmp_path: Path, config: Config) -> None:
    """One without the name of the device, as it was before; and an unknown kernel, which is an error where kernels are used."""
    path = save(tmp_path, config, 4)

    about = json.loads((path / "state.json").read_text())
    del about["attention_on"]
    (path / "state.json").write_bytes(directory._sealed(about))
    saved = load(path, config, "shards")
    assert saved.kernels == KERNELS and saved.kernels_on == ""
    about["attention"][0][-1] = "paged"
    (path / "state.json").write_bytes(directory._sealed(about))
    with pytest.raises(
        CheckpointError, match=r"state.json: attention: unknown kernel 'paged'; valid values: flash, .*engine.attention=torch"
    ):
        load(path, config, "shards")
    load(path, parse(PLAIN | {"engine": {"attention": "torch"}}), "shards")


def test_the_newest_and_the_best_are_kept(tmp_path: Path, config: Config) -> None:
    for step in range(1, 7):
        save(tmp_path, config, step, best=0.9, best_step=2)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert not list(tmp_path.glob(".writing-*"))
    there = [OnDisk(f"step-{step:08d}", step, step / 10) for step in (1, 2, 3)]
    assert retained(there, CheckpointConfig(keep=1, best=False), "step-00000003", best_step=2) == {"step-00000003"}


@pytest.mark.parametrize(("every", "kept"), [("4step", [6, 9, 12]), ("4ep", [9]), ("0ep", [])])
def test_one_at_or_behind_each_multiple_is_kept(tmp_path: Path, every: str, kept: list[int]) -> None:
    """Saved every third step, two steps an epoch: 4 lies between two saves, so the next one is kept."""
    config = parse(PLAIN | {"checkpoint": {"keep": 1, "best": False, "keep_every": every}})
    for step in range(3, 16, 3):
        save(tmp_path, config, step, progress=step / 2)
    assert names(tmp_path) == [f"step-{step:08d}" for step in sorted({*kept, 15})]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, config: Config) -> None:
    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, handle: int, data: Any) -> int:
            os.write(handle, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, config, 1)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, config, 2, Disk(Full()))
    assert latest(tmp_path) == tmp_path / "step-00000001" and not list(tmp_path.glob(".writing-*"))


def test_a_pointer_that_is_lost_or_points_nowhere_finds_the_newest_whole_one(tmp_path: Path, config: Config) -> None:
    assert latest(tmp_path) is None
    save(tmp_path, config, 1), save(tmp_path, config, 2)
    (tmp_path / "latest").write_text("step-00000007")
    assert latest(tmp_path) == tmp_path / "step-00000002"
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == tmp_path / "step-00000002"


def flip(path: Path) -> None:
    """One bit of the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reported"),
    [
        (lambda path: (path / "weights.safetensors").write_bytes(b"short"), "weights.safetensors has 5 bytes"),
        (lambda path: (path / "examples.npz").unlink(), "examples.npz is missing"),
        (lambda path: flip(path / "optimizer.safetensors"), "hash of optimizer.safetensors differs"),
        (lambda path: (path / "state.json").write_text("{"), "state.json can't be read"),
        (lambda path: rewritten(path / "state.json", lambda a: a["state"].update(batch=3)), "state.json was changed"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path: Path, config: Config, harm: Any, reported: str) -> None:
    first, second = save(tmp_path, config, 1), save(tmp_path, config, 2)
    harm(second)
    found = newest(tmp_path)
    assert found.path == first and len(found.damaged) == 1
    assert found.damaged[0].startswith("step-00000002: ") and reported in found.damaged[0]
    save(tmp_path, config, 2)  # what was lost is made again, and the damaged one goes
    assert latest(tmp_path) == tmp_path / "step-00000002.2" and names(tmp_path) == ["step-00000001", "step-00000002.2"]
    assert load(tmp_path / "step-00000002.2", config, "shards").state.step == 2


def test_with_all_checkpoints_damaged_no_run_starts_from_scratch(tmp_path: Path, config: Config) -> None:
    flip(save(tmp_path, config, 1) / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match=r"all checkpoints in .* step-00000001: the hash of weights.safetensors differs.*copy"
    ):
        newest(tmp_path)


def test_the_same_step_saved_again_moves_the_pointer_only(tmp_path: Path, config: Config) -> None:
    """As an attempt does that a crash ended between the new checkpoint and `latest`."""
    path = save(tmp_path, config, 1)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    (tmp_path / "latest").unlink()
    assert save(tmp_path, config, 1, seconds=5.0) == path and (path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert (tmp_path / "latest").read_text() == path.name
    other = config.model_copy(update={"log_every": config.log_every.model_copy(update={"count": 3.0})})
    again = save(tmp_path, other, 1)
    assert again.name == "step-00000001.2" and names(tmp_path) == [again.name], "of several of one step the last counts"


def test_a_checkpoint_that_recorded_the_settings_of_all_methods_is_this_runs(tmp_path: Path) -> None:
    """As earlier versions wrote it: it is gone on from, and the same state saved again is no other checkpoint."""
    levels = {"examples": {"method": "random_epoch", "removed": 0.3}, "tokens": {"method": "tome", "keep": 0.7}}
    config = parse(PLAIN | levels)
    before = recorded(config.resolved(), **levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "resolved", lambda config: before)
        path = save(tmp_path, config, 1)
    assert json.loads((path / "state.json").read_text())["config"]["tokens"].keys() > config.resolved()["tokens"].keys()
    assert load(path, config, "shards").state.step == 1 and save(tmp_path, config, 1) == path
    with pytest.raises(CheckpointError, match=r"examples.removed: checkpoint 0.3, now 0.2"):
        load(path, parse(PLAIN | levels | {"examples": {"method": "random_epoch", "removed": 0.2}}), "shards")


@pytest.mark.parametrize(
    "other",
    [{"chain": "cd"}, {"pending_evaluation": {"at": 1.0}}, {"best_step": 1}, {"skipped": [1]}],
    ids=lambda other: next(iter(other)),
)
def test_another_state_of_the_same_step_is_another_checkpoint(tmp_path: Path, config: Config, other: dict[str, Any]) -> None:
    save(tmp_path, config, 1)
    again = save(tmp_path, config, 1, **other)
    assert again.name == "step-00000001.2" and latest(tmp_path) == again
    assert load(again, config, "shards").state == replace(TrainState(epoch=1, batch=2, step=1, chain="ab"), **other)


def test_the_tenth_of_one_step_is_newer_than_the_second() -> None:
    found = ["step-00000005.10", "latest", "step-00000006", "step-00000005.2", ".writing-step-00000007", "step-00000005"]
    assert by_age(found) == ["step-00000005", "step-00000005.2", "step-00000005.10", "step-00000006"]


def test_one_that_an_older_version_wrote_is_read(tmp_path: Path, config: Config) -> None:
    path = save(tmp_path, config, 1)

    def older(about: dict[str, Any]) -> None:
        about.update(format=1, bytes={name: size for name, (size, _) in about.pop("files").items()})
        del about["seal"], about["state"]["owed"], about["state"]["progress"]

    rewritten(path / "state.json", older)
    assert newest(tmp_path).path == path and load(path, config, "shards").state.pending_evaluation == {}


def test_tensors_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).T,  # not contiguous
        "a": torch.tensor(7.5),
        "half": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "steps": torch.tensor([1, 2**40]),
    }
    Disk().write(tmp_path / "x.safetensors", safetensors_stream.pieces(tensors, {"model": "m"}))
    there = load_file(tmp_path / "x.safetensors")
    assert there.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert there[name].dtype == tensor.dtype and torch.equal(there[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "m"}
    with pytest.raises(ValueError, match=r"x: safetensors does not support torch\.complex64"):
        list(safetensors_stream.pieces({"x": torch.zeros(1, dtype=torch.complex64)}, {}))


def test_another_configuration_or_other_shards_are_refused_by_name(tmp_path: Path, config: Config) -> None:
    path = save(tmp_path, config, 1)
    other = config.changed(seed=5, optim={"lr": 0.25})
    with pytest.raises(CheckpointError, match=r"optim\.lr: checkpoint 0\.001, now 0\.25\n  seed: checkpoint 0, now 5"):
        load(path, other, "shards")
    with pytest.raises(CheckpointError, match=r"shards: checkpoint was trained on shards, data\.train now holds shardz"):
        load(path, config, "shardz")
    free = config.changed(data={"workers": 9})
    assert load(path, free, "shards").state.step == 1
    rewritten(path / "state.json", lambda about: about.update(format=99))
    with pytest.raises(CheckpointError, match="format 99, this version reads up to 2"):
        load(path, config, "shards")


def test_the_guide_lists_what_a_resume_may_change() -> None:
    guide = (ROOT / "docs" / "checkpoints.md").read_text()
    assert [key for key in FREE_TO_CHANGE if f"`{key}`" not in guide] == []


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path, config: Config) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"runs=.*/runs: .*Not a directory.*runs=DIRECTORY"):
        create_run_directory(tmp_path / "runs" / "name", config.resolved(), resume=False)
    with pytest.raises(ConfigError, match=r"File name too long.*name=NAME"):
        create_run_directory(tmp_path / ("a" * 300), config.resolved(), resume=False)


def test_the_position_moves_through_epochs_of_any_length() -> None:
    state = TrainState()
    for _ in range(3):
        state = state.advanced(3)
    assert (state.epoch, state.batch, state.step) == (1, 0, 3)
    assert replace(state, batch=4).advanced(9).batch == 5
    assert json.dumps(state.broken) == "{}"


def test_a_damaged_newer_checkpoint_takes_no_place_of_a_good_one() -> None:
    """After a resume from 200 that skipped a damaged 300: the newest two are those of the resumed run."""
    there = [OnDisk(f"step-{step:08d}", step, step / 10) for step in (100, 200, 250, 300)]
    assert retained(there, CheckpointConfig(keep=2, best=False), "step-00000250", 0) == {"step-00000200", "step-00000250"}


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_damage_without_a_hash(tmp_path: Path, config: Config, change: int) -> None:
    path = save(tmp_path, config, 1)
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:change] if change < 0 else file.read_bytes() + b" ")
    with pytest.raises(directory.Damaged, match=r"weights.safetensors has \d+ bytes, \d+ were written"):
        directory.verify(path, content=False)
