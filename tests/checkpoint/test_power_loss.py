"""A save survives a crash: all that was not synchronised to the disk may be gone, and a usable checkpoint remains."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.crashing_disk import System
from trainer.checkpoint import directory
from trainer.checkpoint.retention import OnDisk, retained
from trainer.config.schema_run import CheckpointConfig
from trainer.storage.disk import Disk

FOLDER = Path("/runs")
SETTINGS = CheckpointConfig.model_validate({"keep": 2, "keep_every": "4step", "best": True})
LIMIT = 100  # states of one moment that are looked at; beyond, that many drawn ones


def content(step: int, mark: str) -> dict[str, bytes]:
    return {"weights": f"weights of step {step}, {mark}".encode() * 3, "examples": f"seen {mark}".encode()}


def save(system: System, step: int, best: int = -1, mark: str = "") -> None:
    """As `save_checkpoint` does it, with texts for tensors."""
    disk = Disk(system)
    files: Any = {name: [data] for name, data in content(step, mark).items()}
    path = directory.write(FOLDER, step, files, {"step": step, "mark": mark}, lambda there: there["mark"] == mark, disk)
    on = []
    for name in directory.by_age(disk.names(FOLDER)):
        try:
            directory.verify(FOLDER / name, disk, content=False)
        except directory.Damaged:
            continue
        on.append(OnDisk(name, directory.step_of(name), 0.0))
    directory.prune(FOLDER, retained(on, SETTINGS, path.name, best), disk)


def usable(system: System) -> tuple[int, str] | None:
    """Step and mark of the checkpoint that a resume takes, its files being those of one save; None where nothing was ever saved."""
    disk = Disk(system)
    found = directory.newest(FOLDER, disk).path
    if found is None:
        return None
    about = directory.verify(found, disk)
    for name, data in content(about["step"], about["mark"]).items():
        assert disk.read(found / name) == data, "mixed"
    return about["step"], about["mark"]


def started(*steps: int) -> System:
    """A folder with whole checkpoints of these steps."""
    system = System()
    Disk(system).make_folder(FOLDER)
    Disk(system).sync(Path("/"))
    for step in steps:
        save(system, step, best=steps[0])
    return system


SCENES = {  # what lies there, and what is then saved: (step, best, mark)
    "the first": ((), [(1, -1, "")]),
    "another": ((1, 2), [(3, 1, "")]),
    "many go": ((1, 2, 3, 4, 5), [(6, 6, ""), (8, 6, "")]),
    "the same again": ((1, 2), [(2, 1, "")]),
    "another of the same step": ((1, 2), [(2, 1, "other settings"), (2, 1, "others again")]),
}


@pytest.mark.parametrize("scene", SCENES)
def test_a_crash_at_any_point_leaves_the_previous_one_or_the_new_one(scene: str) -> None:
    there, saves = SCENES[scene]
    system, rng_keys, cases, seconds = started(*there), random.Random(scene), 0, 0
    allowed: list[tuple[int, str] | None] = [usable(system)]
    left: list[System] = []
    system.after = lambda: left.extend(system.crashed(LIMIT, rng_keys))
    for step, best, mark in saves:
        allowed.append((step, mark))
        save(system, step, best, mark)
        returned = len(left)
        left.extend(system.crashed(LIMIT, rng_keys))
        for number, disk in enumerate(left):
            found = usable(disk)
            assert found in (allowed[-2:] if number < returned else allowed[-1:]), (number, found)
            cases += 1
            if rng_keys.random() < 0.004:  # the next attempt continues from what it finds, saves, and crashes in turn
                again: list[System] = []
                disk.after = lambda disk=disk, again=again: again.extend(disk.crashed(3, rng_keys))
                save(disk, 9, best, "second")
                for late in again:
                    assert usable(late) in (found, (9, "second"))
                seconds += len(again)
                assert usable(disk) == (9, "second")
                assert not [name for name in Disk(disk).names(FOLDER) if name.startswith(directory.TEMPORARY)]
        left.clear()
    print(f"{scene}: {cases} crashes, {seconds} after a second save")
    COUNTED[scene] = cases + seconds


COUNTED: dict[str, int] = {}


def test_there_were_ten_thousand_of_them() -> None:
    if COUNTED.keys() == SCENES.keys():  # not where one test is run alone
        assert sum(COUNTED.values()) >= 10_000, COUNTED


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_an_error_at_any_call_leaves_a_usable_one_and_the_next_save_cleans_up(number: int) -> None:
    calls = 0
    while True:
        system = started(1, 2)
        system.error, system.stop = OSError(number, "the write fails"), system.calls + calls
        try:
            save(system, 3, best=1)
            break
        except OSError as error:
            assert error is system.error
        named = Disk(system).read(FOLDER / directory.LATEST).decode()
        assert usable(system) == (directory.step_of(named), "") and named in ("step-00000002", "step-00000003")
        save(system, 4, best=1)
        assert usable(system) == (4, "") and not [n for n in Disk(system).names(FOLDER) if n.startswith(directory.TEMPORARY)]
        calls += 1
    assert calls > 20, "every call was refused once"


def test_no_partial_file_is_left_behind_on_a_full_disk() -> None:
    """Every write fails from some moment on; what frees space still works."""
    system = started(1, 2)
    before = set(Disk(system).names(FOLDER))
    real = system.write

    def full(handle: int, data: Any) -> int:
        real(handle, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    system.write = full  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OSError, match="No space left"):
        save(system, 3)
    assert set(Disk(system).names(FOLDER)) == before


def test_a_pointer_that_did_not_fit_on_the_disk_is_not_left_behind() -> None:
    """The new checkpoint is whole and stays; only the write of `latest` fails."""
    system = started(1, 2)
    real, opened = system.write, system.open
    last: list[str] = []

    def remembered(path: Any, flags: int, mode: int) -> int:
        last[:] = [Path(path).name]
        return opened(path, flags, mode)

    def full(handle: int, data: Any) -> int:
        if last == [directory.TEMPORARY + directory.LATEST]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    system.open, system.write = remembered, full  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OSError, match="No space left"):
        save(system, 3)
    system.open, system.write = opened, real  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(Disk(system).names(FOLDER)) == ["latest", "step-00000001", "step-00000002", "step-00000003"]
    assert usable(system) == (2, "")
