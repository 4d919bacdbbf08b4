"""Which evaluation becomes the best of a run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from sparsity.types import DENSE
from trainer.checkpoint.state import TrainState
from trainer.model.evaluate import Scores
from trainer.run.recorder import Recorder


@pytest.mark.parametrize(
    ("top1", "saving", "best_step"), [(0.6, True, 7), (0.6, False, 3), (0.5, True, 3), (0.4, True, 3), (math.nan, True, 3)]
)
def test_the_best_is_the_first_of_the_highest_scores_that_were_saved(top1: float, saving: bool, best_step: int) -> None:
    recorder: Any = SimpleNamespace(_log=None)
    results = [(ema, Scores(score, 1.0, 0.1, 0.0, 10, 0, 1.0, [])) for ema, score in ((False, 0.9), (True, top1))]
    state = TrainState(step=7, best=0.5, best_step=3)
    found = Recorder.scored(recorder, state, results, 1.0, DENSE, saving)
    assert found.best_step == best_step and found.best == (top1 if best_step == 7 else 0.5)
