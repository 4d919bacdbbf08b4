"""The garbage collector goes through new objects only during a run, and through everything again behind it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.run import garbage


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    assert gc.get_freeze_count() < 1000, "an earlier test left objects frozen"
    yield
    gc.unfreeze()


def test_a_full_collection_goes_through_what_is_new() -> None:
    before = len(gc.get_objects())
    assert before > 50_000, "this process has imported torch"
    with garbage.only_new_objects_collected():
        kept = [Cycle() for _ in range(100)]
        assert 100 <= len(gc.get_objects()) < before / 10
        garbage.collect_and_freeze()
        assert len(gc.get_objects()) < 100, "alive at the end of the epoch: frozen too"
        assert kept
    assert len(gc.get_objects()) > 0.9 * before and gc.get_freeze_count() == 0


def test_garbage_of_an_epoch_is_collected_at_its_end() -> None:
    with garbage.only_new_objects_collected():
        lost = weakref.ref(Cycle())
        assert lost() is not None
        garbage.collect_and_freeze()
        assert lost() is None


def test_a_failed_run_leaves_nothing_frozen() -> None:
    with pytest.raises(RuntimeError), garbage.only_new_objects_collected():
        raise RuntimeError
    assert gc.get_freeze_count() == 0


def test_full_collections_of_a_run_are_short(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of objects, not by time: between the steps a full collection has a tenth of the process's objects at most."""
    from tests.cli.test_refusals import RECIPE
    from trainer import train
    from trainer.__main__ import main

    found: list[int] = []
    step: Callable = train._step

    def counted(*words: object) -> object:
        found.append(len(gc.get_objects()))
        return step(*words)

    monkeypatch.setattr(train, "_step", counted)
    (tmp_path / "job.yaml").write_text(RECIPE.replace("DIGITS", str(digits)))
    whole = len(gc.get_objects())
    assert main(["train", str(tmp_path / "job.yaml"), f"runs={tmp_path / 'runs'}"]) == 0
    assert found and max(found) < whole / 10
    assert gc.get_freeze_count() == 0
