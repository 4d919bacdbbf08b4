"""Which evaluation becomes the best of a run, and which is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from sparsity.types import DENSE
from trainer.checkpoint.state import TrainState
from trainer.data.errors import DataError
from trainer.model.evaluate import Evaluated, Scores
from trainer.run.rank_zero import RankZeroLog
from trainer.run.recorder import Recorder


@pytest.mark.parametrize(
    ("top1", "saving", "best_step"), [(0.6, True, 7), (0.6, False, 3), (0.5, True, 3), (0.4, True, 3), (math.nan, True, 3)]
)
def test_the_best_is_the_first_of_the_highest_scores_that_were_saved(top1: float, saving: bool, best_step: int) -> None:
    recorder: Any = SimpleNamespace(_log=None)
    results = [
        Evaluated(ema, DENSE, Scores(score, 1.0, 0.1, 0.0, 10, 0, 1.0, [])) for ema, score in ((False, 0.9), (True, top1))
    ]
    state = TrainState(step=7, best=0.5, best_step=3)
    results += [Evaluated(True, DENSE, results[0].scores._replace(top1=0.99), beside=True)]  # one of evaluate.densities
    found = Recorder.scored(recorder, state, results, 1.0, saving)
    assert found.best_step == best_step and found.best == (top1 if best_step == 7 else 0.5)


def test_a_broken_training_image_is_journalled_and_printed() -> None:
    """On the console too: the journal is read after the run, the console during it."""
    written: list[tuple[str, dict[str, Any]]] = []
    printed: list[str] = []
    log: Any = SimpleNamespace(
        journal=SimpleNamespace(write=lambda kind, **fields: written.append((kind, fields))),
        console=SimpleNamespace(message=printed.append, step=lambda **_: None),
        efficiency=SimpleNamespace(of=lambda *_: {}),
    )
    reading: Any = SimpleNamespace(broken={7: "a.tar: not a JPEG"}, facts={"loss": 1.0}, ranks={}, nodes={})
    RankZeroLog.step(log, TrainState(epoch=1, batch=2, step=9), reading, {"training": 1.0})
    where = {"epoch": 1, "batch": 2, "step": 9}
    assert written[0] == ("broken", where | {"id": 7, "reason": "a.tar: not a JPEG"}) and [kind for kind, _ in written] == [
        "broken",
        "step",
    ]
    assert printed == ["broken image 7: a.tar: not a JPEG; excluded from the loss, training continues"]


@pytest.mark.parametrize("broken", [1, 2])
def test_broken_validation_images_are_reported_and_refused_past_their_share(broken: int) -> None:
    """A truncated shard once gave the top-1 of 283 of 359 images, which became the best (two ranks, one of them with broken images)."""
    reported: list[str] = []
    recorder: Any = SimpleNamespace(
        _log=SimpleNamespace(scored=lambda *_: None, say=reported.append),
        engine=SimpleNamespace(all_gather_objects=lambda items: [*items, "other.tar: cut"]),
        config=SimpleNamespace(data=SimpleNamespace(broken_share=0.1)),
    )
    scores = Scores(0.9, 1.0, 0.1, 0.0, 20 - broken, broken, 1.0, [], ("a.tar: not a JPEG",)[: broken - 1])
    state, text = TrainState(step=7), f"{broken} of 20 validation images are broken and not scored: "
    if broken == 2:
        assert Recorder.scored(recorder, state, [Evaluated(False, DENSE, scores)], 1.0, True).best_step == 7
        assert reported == [text + "a.tar: not a JPEG; other.tar: cut"]
        recorder.config.data.broken_share = 0.09
    else:
        recorder.config.data.broken_share = 0.0
    with pytest.raises(DataError, match=text + r".*other.tar: cut. .*data.broken_share=0.*trilevel verify"):
        Recorder.scored(recorder, state, [Evaluated(False, DENSE, scores)], 1.0, True)
